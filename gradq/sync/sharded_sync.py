"""ShardedSync: gradients of sharded parameters; each rank gets the mean of its own shard.

Its collectives are driven to their end on the calling thread: FSDP uses the result of a reduction at once.
FSDP reduces each of its units by itself, in the same order on all ranks; a step is one outermost backward, in
which a unit may be reduced several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from gradq import wire
from gradq.codecs import Codec
from gradq.collectives import AllGather, ReduceScatter, Scratch, Setting, ShardSegment, Step
from gradq.errors import UnsupportedError
from gradq.metrics import Event
from gradq.options import SyncConfig
from gradq.policy import AdaptivePolicy, ParameterInfo, Plan, Policy
from gradq.sync.base import Sync
from gradq.sync.gradient_sync import GradientSync
from gradq.sync.layout import work_dtype
from gradq.sync.plan import ResolvedPlan
from gradq.transport.contract import Pending

__all__ = ["ShardedSync"]

_FLAGS_BUCKET = 0xFFFF


class ShardedSync(Sync):
    """Reduces sharded gradients over the ranks of a group, and gathers sharded parameters; see `Sync`.

    Args:
        parameters: whole parameters, in the dtype of the reduction; all not named here as in `Sync`.
        shard_numels: elements of each that a rank holds, padding included.
        gather_plan: how parameters travel when they are gathered; empty leaves that alone.

    Attributes:
        gather_plan: the argument.
        replicas: what averages the shards over replicas, if there are any; its steps are those of this.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterInfo],
        shard_numels: Mapping[str, int],
        policy: Policy | None,
        label: str,
        group: dist.ProcessGroup,
        config: SyncConfig,
        gather_plan: Plan | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._shard_numels = dict(shard_numels)
        self.gather_plan = dict(gather_plan or {})
        self.replicas: GradientSync | None = None
        self._scratch = Scratch(device or torch.device("cpu"))
        self._reduced: set[int] = set()
        super().__init__(parameters, policy, label, group, config, device)

    def resolve(self, policy: Policy | None, label: str) -> ResolvedPlan:
        """See `Sync`.

        Raises:
            UnsupportedError: also for a policy that plans again during training, and for low rank: they need
                whole gradients at a step boundary, which FSDP does not have.
        """
        if isinstance(policy, AdaptivePolicy):
            raise UnsupportedError(
                f"{label} plans again during training, which FSDP2 has no place for; give it fixed specs"
            )
        resolved = super().resolve(policy, label)
        for name, entry in resolved.plan.items():
            if entry.collective != "auto":
                raise UnsupportedError(
                    f"{name!r} travels by {entry.collective!r}, which needs the whole mean on every rank; "
                    "FSDP2 gives each its shard: choose another spec, such as int8"
                )
        return resolved

    def codecs(self, resolved: ResolvedPlan) -> set[tuple[Codec, bool]]:
        """See `Sync`: what one phase needs, and what gathering does."""
        used = {(entry.phase1, entry.feedback1) for entry in resolved.plan.values()}
        return used | {(entry.phase1, False) for entry in self.gather_plan.values()}

    def drop_layouts(self) -> None:
        """See `Sync`."""
        self._layouts: dict[object, ReduceScatter | AllGather] = {}

    def notes(self, resolved: ResolvedPlan, label: str) -> dict[str, object]:
        """See `Sync`."""
        gather = {name: str(entry) for name, entry in self.gather_plan.items()}
        return super().notes(resolved, label) | {"gather": gather}

    def segment(self, name: str) -> ShardSegment:
        """How a parameter travels, in rows of its own."""
        return self._segment(self.plan, name)

    def shard(self, name: str, owner: int) -> tuple[int, int]:
        """The elements [start, stop) of a parameter in the shard of a rank, padding left out."""
        return self.segment(name).shard(self.world_size, owner)

    def _segment(self, plan: Plan, name: str, start: int = 0) -> ShardSegment:
        entry = plan[name]
        return ShardSegment(
            name=name,
            start=start,
            numel=self.parameters[name].numel,
            rotation=0,
            phase1=entry.phase1,
            phase2=entry.phase2,
            feedback1=entry.feedback1,
            feedback2=False,
            shard_numel=self._shard_numels[name],
        )

    def _segments(self, plan: Plan, names: Sequence[str], flat: Tensor) -> list[ShardSegment]:
        segments, start = [], 0
        for name in names:
            segments.append(self._segment(plan, name, start))
            start += segments[-1].shard_numel
        if start * self.world_size != flat.numel():
            raise UnsupportedError(
                f"FSDP exchanges {flat.numel()} elements where {', '.join(names[:3])}, ... have "
                f"{start * self.world_size}; it does not lay out these parameters as gradq expects"
            )
        return segments

    def _setting_of(self, device: torch.device, channel: int, byte_kind: str) -> Setting:
        return replace(self.setting(device), channels=[self.channels[channel]], byte_kinds=(byte_kind,))

    def reduce_scatter(
        self, flat: Tensor, out: Tensor, names: Sequence[str], *, index: int, factor: float
    ) -> None:
        """Reduce one unit and wait for it.

        Args:
            flat: [W * n], row r what rank r will own of the named parameters; this rank's row is overwritten.
            out: [n], gets factor times the mean over ranks.
            names: the names of the parameters, in order.
            index: the index of the unit.
            factor: W for a sum.

        Raises:
            PeerError, WireError: an exchange failed; every later one fails with the same error.
        """
        self.enter(index)
        dense_bytes = flat.nbytes * (self.world_size - 1) // self.world_size
        self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
        key, dtype = (index, tuple(names), flat.dtype), work_dtype(flat.dtype)
        layout = self._layouts.get(key)
        if layout is None:
            segments = self._segments(self.plan, names, flat)
            for name in names:
                if self.parameters[name].dtype != flat.dtype:
                    raise UnsupportedError(
                        f"the gradient of {name!r} is reduced in {flat.dtype}, but was to be in "
                        f"{self.parameters[name].dtype} when gradq.compress was called; call it afterwards"
                    )
            setting = self._setting_of(flat.device, 0, "wire_bytes")
            layout = self._layouts[key] = ReduceScatter(segments, dtype, setting, self._scratch)
        work = flat
        if flat.dtype != dtype:
            work = self._scratch.take("work", flat.numel() * dtype.itemsize).view(dtype).copy_(flat)
        self._drive(layout.average(work, self.step_of(index)))
        row = work.view(self.world_size, -1)[self.rank]
        if factor != 1:
            row *= factor
        out.copy_(row)
        if self.has_feedback:
            self.check.add(row, out.dtype)

    def all_gather(self, flat: Tensor, names: Sequence[str], *, index: int) -> None:
        """Fill flat [W * n], of which this rank has filled its own row, with the decoded parameters.

        In one step the same weights travel as the same bytes, so backward sees what forward saw.
        """
        dense_bytes = flat.nbytes * (self.world_size - 1) // self.world_size
        self.metrics.record(Event("dense_gather_bytes", dense_bytes, self.step, index))
        key = ("gather", index, flat.dtype)
        layout = self._layouts.get(key)
        if layout is None:
            segments = self._segments(self.gather_plan, names, flat)
            setting = self._setting_of(flat.device, 1, "gather_bytes")
            layout = self._layouts[key] = AllGather(segments, work_dtype(flat.dtype), setting, self._scratch)
        self._drive(layout.average(flat, Step(self.step, index)))

    def enter(self, index: int) -> None:
        """Note that a unit is reduced. The second time in a step it owes what was lost the first time."""
        if index in self._reduced:
            for sync in self._syncs():
                sync.feedback.carry()
            self._reduced.clear()
        self._reduced.add(index)

    def _syncs(self) -> list[Sync]:
        """This one, and the one that averages replicas, if there is one."""
        return [self] if self.replicas is None else [self, self.replicas]

    def begin_step(self) -> None:
        """Start a step, for the replicas too, whose number a checkpoint may have set."""
        if self.replicas is not None:
            self.step = self.replicas.step
            self.replicas.begin_step()
        super().begin_step()
        self._reduced.clear()

    def end_step(self) -> None:
        """End a step, for the replicas too. With feedback all ranks hear whether all are content with it.

        A step in which the averaging failed does not end.
        """
        syncs = self._syncs()
        if any(sync.failure is not None for sync in syncs):
            return
        verdicts = [bool(sync.verdict()) for sync in syncs]  # FSDP2 with feedback is on the CPU
        verdict = all(verdicts)
        if self.world_size > 1 and any(sync.has_feedback for sync in syncs):
            verdict = self._all_ranks(verdict)
        for sync in syncs:
            sync.commit_step(verdict)

    def discard_step(self) -> None:
        """See `GradientSync.discard_step`; for the replicas too."""
        super().discard_step()
        if self.replicas is not None:
            self.replicas.discard_step()

    def abandon(self) -> None:
        """Forget a step that did not come to its end."""
        for sync in self._syncs():
            sync.feedback.finish(False)

    def _all_ranks(self, verdict: bool) -> bool:
        """Whether it holds on all ranks."""
        flags = torch.zeros(self.world_size, wire.HEADER_BYTES + 1, dtype=torch.uint8)
        flags[self.rank, -1] = int(verdict)
        header = wire.Header(2, self.rank, _FLAGS_BUCKET, self.step, 0)
        self.metrics.record(Event("wire_bytes", flags[0].numel() * (self.world_size - 1), self.step))
        rows = list(flags)
        pending = self.channels[1].post([rows[self.rank]] * self.world_size, rows, header)
        self._drive([pending])
        return bool(flags[:, -1].all())

    def _drive(self, stages: Iterable[Pending]) -> None:
        """Run a collective to its end on this thread; on NCCL, enqueue it on the current stream."""
        if self.failure is not None:
            raise self.failure
        try:
            with torch.no_grad():
                for pending in stages:
                    pending.wait()
        except BaseException as error:
            self.fail(error)
            raise
