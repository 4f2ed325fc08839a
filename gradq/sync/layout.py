"""Layout: which codec and which collective each parameter travels by, and so where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from gradq.codecs import Codec
from gradq.codecs.uniform.format import BACKENDS
from gradq.collectives import Collective, Segment, choose
from gradq.kernels.turns import in_turns
from gradq.metrics import ParameterStats
from gradq.options import SyncConfig
from gradq.policy import ParameterInfo, Plan, Policy, check_plan
from gradq.policy.warm_up import warm_up_calls

__all__ = ["Ways"]


@dataclass(frozen=True)
class Ways:
    """A plan, and by which collective each of its parameters travels.

    Attributes:
        parameters: all parameters, by name.
        world_size: number of ranks.
        local_world_size: ranks a node for "hierarchical", else 1.
        plan: the codecs; empty if gradients are left to a plain all-reduce.
        plain: the collective of the whole model.
        collectives: of each parameter in the plan.
    """

    parameters: Mapping[str, ParameterInfo]
    world_size: int
    local_world_size: int
    plan: Plan
    plain: type[Collective]
    collectives: Mapping[str, type[Collective]]

    @classmethod
    def of(
        cls,
        policy: Policy | None,
        label: str,
        parameters: Mapping[str, ParameterInfo],
        config: SyncConfig,
        world_size: int,
    ) -> Ways:
        """What a policy, called label, decides.

        Raises:
            ConfigError: the plan does not fit the parameters.
        """
        plan = dict(policy.plan(list(parameters.values()))) if policy is not None else {}
        if plan:
            check_plan(plan, parameters, label)
        payload_bytes = int(sum(entry.payload_bytes(parameters[name]) for name, entry in plan.items()))
        plain = choose(config.collective, world_size, payload_bytes)
        collectives = {
            name: choose(entry.resolve(config.collective), world_size, plain=plain)
            for name, entry in plan.items()
        }
        return cls(parameters, world_size, config.local_world_size, plan, plain, collectives)

    @cached_property
    def has_feedback(self) -> bool:
        """Whether anything keeps a residual."""
        return any(entry.feedback1 or entry.feedback2 for entry in self.plan.values())

    def notes(self) -> dict[str, object]:
        """What all ranks must have in common: every parameter, and its codecs."""
        return {
            name: (info.shape, str(info.dtype), str(self.plan.get(name, "plain")))
            for name, info in self.parameters.items()
        }

    def stats(self) -> dict[str, ParameterStats]:
        """How every parameter in the plan travels."""
        table = {}
        for name, entry in self.plan.items():
            info = self.parameters[name]
            bits = 8 * entry.payload_bytes(info) / max(info.numel, 1)
            table[name] = ParameterStats(info.numel, str(entry), bits)
        return table

    def load_kernels(self, device: torch.device) -> None:
        """Import the kernels, which is quick, so that a rank without them says so before the others compile.

        Raises:
            KernelError: this machine has no kernels for the device.
        """
        if self.plan and self.world_size > 1:
            BACKENDS.on(device)

    def codecs(self) -> set[tuple[Codec, bool]]:
        """The codecs that the collectives use, each with or without a residual."""
        entries = self.plan.items()
        # what low rank feeds back never goes through a codec
        used = {(entry.phase1, entry.feedback1 and not entry.low_rank) for _, entry in entries}
        return used | {(entry.phase2, entry.feedback2) for name, entry in entries if self._has_phase2(name)}

    def warm_up(self, device: torch.device, codecs: Iterable[tuple[Codec, bool]] | None = None) -> None:
        """Compile everything that the plan needs.

        Args:
            device: of the gradients.
            codecs: what is used; by default what the collectives use.
        """
        calls = warm_up_calls(self.codecs() if codecs is None else codecs, device, self.world_size)
        calls += [partial(collective.warm_up, device) for collective in set(self.collectives.values())]
        in_turns(calls)

    def _has_phase2(self, name: str) -> bool:
        return self.collectives[name].has_phase2(self.world_size, self.local_world_size)

    def segment(self, name: str) -> Segment:
        """How a parameter travels, in a bucket of its own."""
        info, entry, local = self.parameters[name], self.plan[name], self.local_world_size
        return Segment(
            name=name,
            start=0,
            numel=info.numel,
            rotation=info.index,
            phase1=entry.phase1,
            phase2=entry.phase2,
            feedback1=entry.feedback1,
            feedback2=entry.feedback2 and self._has_phase2(name),
            matrix=info.matrix,
            low_rank=min(entry.low_rank, *info.matrix),
            local_world_size=local,
        )

    def shard_pieces(self, rank: int) -> dict[str, tuple[int, int]]:
        """The part of each parameter of which a rank keeps a shard residual."""
        segments = [self.segment(name) for name in self.plan]
        return {s.name: s.piece(self.world_size, rank) for s in segments if s.feedback2}
