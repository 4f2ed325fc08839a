"""ResolvedPlan: which codec and which collective each parameter travels by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from gradq.codecs import Codec
from gradq.collectives import Collective, LowRankSegment, Segment, Transfer, choose
from gradq.kernels.turns import in_turns
from gradq.metrics import ParameterStats
from gradq.options import SyncConfig
from gradq.policy import ParameterInfo, Plan, Policy, check_plan

__all__ = ["ResolvedPlan"]


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan, and by which collective each of its parameters travels.

    Attributes:
        parameters: all parameters, by name.
        world_size: number of ranks.
        local_world_size: ranks a node for "hierarchical", else 1.
        plan: the codecs; empty if gradients are left to a plain all-reduce.
        plain: the collective of the whole model.
        collectives: the collective of each parameter in the plan.
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
    ) -> ResolvedPlan:
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

    def codecs(self) -> set[tuple[Codec, bool]]:
        """The codecs that the collectives use, each with or without a residual."""
        entries = self.plan.items()
        # what low rank feeds back never goes through a codec
        used = {(entry.phase1, entry.feedback1 and not entry.low_rank) for _, entry in entries}
        return used | {(entry.phase2, entry.feedback2) for name, entry in entries if self._has_phase2(name)}

    def warm_up(self, device: torch.device, codecs: set[tuple[Codec, bool]] | None = None) -> None:
        """Compile everything that the plan needs, in turns with the other ranks of this machine.

        Args:
            device: device of the gradients.
            codecs: what is used, each with or without a residual; `codecs` by default.

        Raises:
            KernelError: a codec has no kernels for the device.
        """
        codecs = self.codecs() if codecs is None else codecs
        calls: list[Callable[[], None]] = [
            partial(codec.warm_up, device, self.world_size, feedback)
            for codec, feedback in sorted(codecs, key=str)
        ]
        in_turns(calls + [partial(collective.warm_up, device) for collective in self.used])

    @cached_property
    def used(self) -> frozenset[type[Collective]]:
        """The collectives of all parameters."""
        return frozenset(self.collectives.values())

    def _has_phase2(self, name: str) -> bool:
        return self.collectives[name].has_phase2(self.world_size, self.local_world_size)

    def segment(self, name: str) -> Segment:
        """How a parameter travels, in a chunk of its own."""
        info, entry = self.parameters[name], self.plan[name]
        segment = Segment(
            name=name,
            start=0,
            numel=info.numel,
            rotation=info.index,
            phase1=entry.phase1,
            phase2=entry.phase2,
            feedback1=entry.feedback1,
            feedback2=entry.feedback2 and self._has_phase2(name),
        )
        if not entry.low_rank:
            return segment
        rank = min(entry.low_rank, *info.matrix)
        return LowRankSegment(**vars(segment), matrix=info.matrix, low_rank=rank, inner=self.plain)

    def transfers(self, names: Sequence[str]) -> list[Transfer]:
        """The segments of some parameters, and the collectives that they travel by."""
        return [(self.collectives[name], self.segment(name)) for name in names]

    def shard(self, name: str, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of a parameter whose mean a rank encodes in phase 2."""
        collective = self.collectives[name]
        return collective.shard_of(self.segment(name), self.world_size, self.local_world_size, owner)

    def residual_shards(self, rank: int) -> dict[str, tuple[int, int]]:
        """The elements of each parameter of which a rank keeps a shard residual."""
        kept = [name for name in self.plan if self.segment(name).feedback2]
        return {name: self.shard(name, rank) for name in kept}
