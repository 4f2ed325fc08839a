"""Bit allocation: the bits of one spec, spent where they lower the error most, and again every N steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gradq import wire
from gradq.codecs import Codec
from gradq.errors import CheckpointError, ConfigError
from gradq.metrics import Event
from gradq.policy.allocate import GradientStatistics, allocate_bits
from gradq.policy.base import Assignment, ParameterInfo
from gradq.policy.fixed import ExactRule, FixedPolicy
from gradq.policy.spec import Spec

__all__ = ["BitAllocation"]

CANDIDATES = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")


class BitAllocation:
    """Gives every parameter its own codec by the errors measured on its gradients.

    It starts with one spec for all. In sampled steps every rank measures the error of every candidate on its
    own gradients; every so many steps the ranks add these up, and `allocate_bits` chooses the codecs that
    send the same bytes with the least error (or, with error_of, the same error with the fewest bytes).

    The budget is of phase 1, scales included. Phase 2 has the codec each candidate has by default. Parameters
    that travel exact are no part of it. One object serves one model.

    Args:
        average_bits: the mean number of bits for an element, scales included: "int4" has 4.0625.
        bytes_of: a spec whose bytes to spend.
        error_of: a spec whose error to keep. Give one of the three.
        candidates: specs of one codec each to choose from.
        every: the number of steps between plans; the first comes after so many.
        samples: the number of steps of them in which the candidates are measured; the last one, and others
            evenly before. One costs as much as encoding and decoding the gradients once for every candidate.
        weighting: "energy": a parameter counts by the size of its error, as in the gradient vector;
            "relative": by the error's share of its gradient times its elements, so that loud parameters get
            no more than quiet ones. See docs/bits.md for what was measured.
        exact: the rule that says which parameters travel exact; see `FixedPolicy`.
        feedback: error feedback; see `FixedPolicy`. A parameter that moves to a codec without feedback
            loses its residual.

    Raises:
        ConfigError: not exactly one budget, or an argument outside its range; SpecError: a spec is wrong.

    Example:
        >>> handle = gradq.compress(model, gradq.BitAllocation(bytes_of="int4"))  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        average_bits: float | None = None,
        bytes_of: str | Codec | Spec | None = None,
        error_of: str | Codec | Spec | None = None,
        candidates: Sequence[str | Codec] = CANDIDATES,
        every: int = 100,
        samples: int = 2,
        weighting: str = "energy",
        exact: ExactRule = (),
        feedback: bool | str = "auto",
    ) -> None:
        budgets = {"average_bits": average_bits, "bytes_of": bytes_of, "error_of": error_of}
        given = {name: value for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                "BitAllocation takes one of average_bits=4.5, bytes_of='int4' and error_of='int4', "
                f"not {' and '.join(given) or 'none'}"
            )
        if average_bits is not None and not 0 < average_bits < math.inf:
            raise ConfigError(f"average_bits={average_bits!r}: it must be positive")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"every={every!r}: it must be a number of steps, at least 1")
        if isinstance(samples, bool) or not isinstance(samples, int) or not 1 <= samples <= every:
            raise ConfigError(f"samples={samples!r}: it must be a number of steps, from 1 to every={every}")
        if weighting not in ("energy", "relative"):
            raise ConfigError(f"weighting={weighting!r}: choose 'energy' or 'relative'")
        if isinstance(candidates, str) or len(candidates) < 2:
            raise ConfigError(f"candidates={candidates!r}: there must be at least two, in a list")
        self._every, self._samples, self._weighting = every, samples, weighting
        self._average_bits, self._limits_error = average_bits, error_of is not None
        specs = {str(spec): spec for spec in map(_one_codec, candidates)}
        reference = bytes_of if error_of is None else error_of
        self._reference = None if reference is None else str(_one_codec(reference))
        if reference is not None:  # so that the budget can always be met
            specs.setdefault(str(self._reference), _one_codec(reference))
        self._policies = {
            name: FixedPolicy(spec=spec, exact=exact, feedback=feedback) for name, spec in specs.items()
        }
        self._codecs = {name: policy.assignment().phase1 for name, policy in self._policies.items()}
        self.label = (
            f"BitAllocation({', '.join(f'{name}={str(value)!r}' for name, value in given.items())}, "
            f"candidates={list(self._codecs)}, every={every}, samples={samples}, "
            f"weighting={weighting!r})"
        )
        self._numel: dict[str, int] = {}  # elements of each compressed parameter
        self._choice: dict[str, str] = {}
        self._sums: dict[tuple[str, str], float] = {}  # by parameter and candidate, "" for the energy

    # --- planning ------------------------------------------------------------------------------------------

    def plan(self, parameters: Sequence[ParameterInfo]) -> dict[str, Assignment]:
        """The current allocation; at first, one codec for all.

        Raises:
            ConfigError: the candidates cannot meet the budget, or this object has served another model.
        """
        plans = {name: policy.plan(parameters) for name, policy in self._policies.items()}
        quantized = min(plans.values(), key=lambda plan: sum(entry.exact for entry in plan.values()))
        numel = {p.name: p.numel for p in parameters if not quantized[p.name].exact}
        if self._numel and numel != self._numel:
            raise ConfigError("this BitAllocation serves another model; make one for each")
        self._numel = numel
        if not self._choice:
            self._choice = dict.fromkeys(numel, self._first_choice())
            for codec in self._codecs.values():  # measuring must not wait for a compiler in a training step
                codec.warm_up(feedback=False)
        return {
            p.name: plans[self._choice[p.name]][p.name] if p.name in numel else quantized[p.name]
            for p in parameters
        }

    def _nbytes(self, name: str) -> int:
        """Payload of phase 1 if all parameters had one candidate."""
        return sum(self._codecs[name].nbytes(numel) for numel in self._numel.values())

    def _budget_bytes(self) -> float:
        if self._average_bits is None:
            assert self._reference is not None
            return self._nbytes(self._reference)
        return self._average_bits * sum(self._numel.values()) / 8

    def _first_choice(self) -> str:
        """The reference, or the candidate that comes closest to the budget from below."""
        if self._reference is not None:
            return self._reference
        budget = self._budget_bytes()
        fitting = [name for name in self._codecs if self._nbytes(name) <= budget]
        if not fitting:
            least = min(self._nbytes(name) for name in self._codecs)
            bits = 8 * least / max(1, sum(self._numel.values()))
            raise ConfigError(
                f"average_bits={self._average_bits} cannot be met: the smallest candidate takes {bits:.4f} "
                "bits an element, scales included"
            )
        return max(fitting, key=self._nbytes)

    @property
    def allocation(self) -> dict[str, str]:
        """The candidate of every parameter that is compressed; empty before the first plan."""
        return dict(self._choice)

    # --- measuring -----------------------------------------------------------------------------------------

    def candidates(self, step: int, name: str) -> Mapping[str, Codec]:
        """All candidates for a compressed parameter in a sampled step, else none."""
        left = self._every - 1 - step % self._every
        stride = self._every // self._samples
        sampled = left % stride == 0 and left // stride < self._samples
        return self._codecs if sampled and name in self._numel else {}

    def observe(self, event: Event) -> None:
        """Add up energies and errors."""
        if event.kind in ("gradient_energy", "candidate_error"):
            key = (event.parameter, event.codec)
            self._sums[key] = self._sums.get(key, 0.0) + event.value

    def is_due(self, step: int) -> bool:
        """Whether `every` steps have passed since the last plan."""
        return step > 0 and step % self._every == 0

    def _keys(self) -> list[tuple[str, str]]:
        """What is measured, in an order that all ranks share."""
        return [(name, codec) for name in sorted(self._numel) for codec in ("", *self._codecs)]

    def measured(self) -> list[float]:
        """Sums of squares since the last plan: for every parameter the energy and the candidates' errors."""
        return [self._sums.get(key, 0.0) for key in self._keys()]

    def learn(self, everyone: Sequence[Sequence[float]]) -> None:
        """Allocate by the sums over all ranks."""
        total = np.zeros(len(self._keys()))
        for measured in everyone:
            total += np.array(measured)
        self._sums.clear()
        statistics = self._statistics(dict(zip(self._keys(), total.tolist(), strict=True)))
        if not any(entry.energy for entry in statistics.values()):
            return  # nothing was sampled, or nothing finite
        if self._limits_error:
            assert self._reference is not None
            error = math.fsum(entry.errors[self._reference] for entry in statistics.values())
            self._choice = allocate_bits(statistics, list(self._codecs), error_budget=error).specs
        else:
            budget = self._budget_bytes()
            self._choice = allocate_bits(statistics, list(self._codecs), budget_bytes=budget).specs

    def _statistics(self, sums: Mapping[tuple[str, str], float]) -> dict[str, GradientStatistics]:
        """By parameter. One whose gradient was zero, or never finite, is taken to be like the average."""
        all_numel = max(1, sum(self._numel.values()))
        average = {
            codec: math.fsum(sums[name, codec] for name in self._numel) / all_numel
            for codec in ("", *self._codecs)
        }
        statistics = {}
        for name, numel in self._numel.items():
            unseen = sums[name, ""] == 0
            own = {c: average[c] * numel if unseen else sums[name, c] for c in ("", *self._codecs)}
            if self._weighting == "relative" and own[""] > 0:
                own = {c: value * numel / own[""] for c, value in own.items()}
            statistics[name] = GradientStatistics(numel=numel, energy=own.pop(""), errors=own)
        return statistics

    # --- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The plan, as positions among the candidates."""
        names = list(self._codecs)
        choice = [names.index(self._choice[name]) for name in sorted(self._choice)]
        return {"digest": torch.tensor(self._digest()), "choice": torch.tensor(choice, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], measured: Sequence[float]) -> None:
        """Continue from a plan and from what this rank had measured.

        Raises:
            CheckpointError: the state is of other candidates or of another model.
        """
        if int(state["digest"]) != self._digest():
            raise CheckpointError(
                f"the saved plan is of another model or of other candidates than {list(self._codecs)}"
            )
        names = list(self._codecs)
        picks = state["choice"].tolist()
        self._choice = {name: names[pick] for name, pick in zip(sorted(self._numel), picks, strict=True)}
        self._sums = dict(zip(self._keys(), measured, strict=True))

    def _digest(self) -> int:
        return wire.layout_digest(f"{list(self._codecs)} {sorted(self._numel.items())}")


def _one_codec(spec: str | Codec | Spec) -> Spec:
    parsed = Spec.parse(spec)
    if parsed.is_none or parsed.phase2 is not None:
        raise ConfigError(
            f"{str(parsed)!r}: BitAllocation chooses codecs of phase 1; name one such as 'int4'"
        )
    return parsed
