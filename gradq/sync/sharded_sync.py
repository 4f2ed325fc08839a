"""ShardedSync: gradients of sharded parameters; each rank gets the mean of its own shard.

It is a `GradientSync` whose collective is `ReduceScatter`, driven to its end on the calling thread: FSDP uses
the result of a reduction at once. FSDP reduces each of its units by itself, in the same order on all ranks; a
step is one outermost backward, in which a unit may be reduced several times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from gradq import wire
from gradq.collectives import AllGather, ReduceScatter, Scratch, ShardSegment, Step
from gradq.collectives.base import Setting
from gradq.errors import UnsupportedError
from gradq.metrics import Event
from gradq.options import SyncConfig
from gradq.policy import AdaptivePolicy, ParameterInfo, Plan, Policy
from gradq.sync.gradient_sync import GradientSync
from gradq.sync.layout import Ways
from gradq.transport.contract import Pending
from gradq.transport.handshake import meeting

__all__ = ["ShardedSync"]

_FLAGS_BUCKET = 0xFFFF


class ShardedSync(GradientSync):
    """Reduces sharded gradients over the ranks of a group, and gathers sharded parameters.

    Args:
        parameters: whole parameters; their dtype is that of the reduction.
        chunks: elements of each that a rank holds, padding included.
        policy: which codec for which parameter; None leaves reductions alone.
        label: what the policy is called when ranks compare notes.
        group: the ranks a parameter is sharded over.
        config: see `SyncConfig`; there is one collective, so its choice is ignored.
        gather_plan: how parameters travel when they are gathered; empty leaves that alone.
        device: of the gradients; the CPU by default.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterInfo],
        chunks: Mapping[str, int],
        policy: Policy | None,
        label: str,
        group: dist.ProcessGroup,
        config: SyncConfig,
        gather_plan: Plan | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._chunks = dict(chunks)
        self.gather_plan = dict(gather_plan or {})
        self.replicas: GradientSync | None = None  # averages the shards over replicas; its steps are ours
        self._layouts: dict[object, ReduceScatter | AllGather] = {}
        self._scratch: Scratch | None = None
        self._reduced: set[int] = set()
        super().__init__(parameters, policy, label, group, config, device)

    def _prepare(self, policy: Policy | None, label: str) -> Ways:
        """See `GradientSync`.

        Raises:
            UnsupportedError: also for a policy that plans again during training, and for low rank: they need
                whole gradients at a step boundary, which FSDP does not have.
        """
        if isinstance(policy, AdaptivePolicy):
            raise UnsupportedError(
                f"{label} plans again during training, which FSDP2 has no place for; give it fixed specs"
            )
        ways = super()._prepare(policy, label)
        if by := [name for name, entry in ways.plan.items() if entry.collective != "auto"]:
            raise UnsupportedError(
                f"{by[0]!r} travels by {ways.plan[by[0]].collective!r}, which needs the whole mean on every "
                "rank; FSDP2 gives each its shard: choose another spec, such as int8"
            )
        return ways

    def _warm_up(self, ways: Ways, verb: str = "start") -> None:
        """See `GradientSync`: what one phase needs, and what gathering does."""
        if self.world_size > 1 and (ways.plan != self.plan or self.gather_plan):
            with meeting(self.group, verb):
                used = {(entry.phase1, entry.feedback1) for entry in ways.plan.values()}
                used |= {(entry.phase1, False) for entry in self.gather_plan.values()}
                ways.warm_up(self.device, used)

    def _adopt(self, ways: Ways, policy: Policy | None, label: str) -> None:
        super()._adopt(ways, policy, label)
        self._layouts.clear()

    def _notes(self, ways: Ways, label: str) -> dict[str, object]:
        notes = super()._notes(ways, label)
        return notes | {"gather": {name: str(entry) for name, entry in self.gather_plan.items()}}

    def segment(self, name: str, start: int = 0) -> ShardSegment:
        """How a parameter travels if its chunk starts at this element of a row."""
        return self._segment(self.plan, name, start)

    def _segment(self, plan: Plan, name: str, start: int) -> ShardSegment:
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
            chunk=self._chunks[name],
        )

    def _segments(self, plan: Plan, names: Sequence[str], flat: Tensor) -> list[ShardSegment]:
        segments, start = [], 0
        for name in names:
            segments.append(self._segment(plan, name, start))
            start += segments[-1].chunk
        if start * self.world_size != flat.numel():
            raise UnsupportedError(
                f"FSDP exchanges {flat.numel()} elements where {', '.join(names[:3])}, ... have "
                f"{start * self.world_size}; it does not lay out these parameters as gradq expects"
            )
        return segments

    def _shared_scratch(self, device: torch.device) -> Scratch:
        if self._scratch is None:
            self._scratch = Scratch(device)
        return self._scratch

    def _setting_with_scratch(self, device: torch.device, channel: int, byte_kind: str) -> Setting:
        return replace(
            self._setting(device),
            channels=[self._channels[channel]],
            byte_kinds=(byte_kind,),
            scratch=self._shared_scratch(device),
        )

    def reduce_scatter(
        self, flat: Tensor, out: Tensor, names: Sequence[str], *, index: int, factor: float
    ) -> None:
        """Reduce one unit and wait for it.

        Args:
            flat: [W * n], row r what rank r will own of the named parameters; this rank's row is overwritten.
            out: [n], gets factor times the mean over ranks.
            names: of the parameters, in order.
            index: of the unit.
            factor: W for a sum.

        Raises:
            PeerError, WireError: an exchange failed; every later one fails with the same error.
        """
        self.enter(index)
        dense_bytes = flat.nbytes * (self.world_size - 1) // self.world_size
        self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
        key = (index, tuple(names), flat.dtype)
        layout = self._layouts.get(key)
        work_dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        if layout is None:
            segments = self._segments(self.plan, names, flat)
            for name in names:
                if self.parameters[name].dtype != flat.dtype:
                    raise UnsupportedError(
                        f"the gradient of {name!r} is reduced in {flat.dtype}, but was to be in "
                        f"{self.parameters[name].dtype} when gradq.compress was called; call it afterwards"
                    )
            setting = self._setting_with_scratch(flat.device, 0, "wire_bytes")
            layout = self._layouts[key] = ReduceScatter(segments, work_dtype, setting)
        work = flat
        if flat.dtype != work_dtype:
            scratch = self._shared_scratch(flat.device)
            work = scratch.take("work", flat.numel() * work_dtype.itemsize).view(work_dtype).copy_(flat)
        self._drive(layout.average(work, Step(self.step, index, self._loss_scale, self._sample)))
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
            work_dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
            segments = self._segments(self.gather_plan, names, flat)
            setting = self._setting_with_scratch(flat.device, 1, "gather_bytes")
            layout = self._layouts[key] = AllGather(segments, work_dtype, setting)
        self._drive(layout.average(flat, Step(self.step, index)))

    def enter(self, index: int) -> None:
        """Note that a unit is reduced. The second time in a step it owes what was lost the first time."""
        if index in self._reduced:
            for sync in self._syncs():
                sync.feedback.carry()
            self._reduced.clear()
        self._reduced.add(index)

    def _syncs(self) -> list[GradientSync]:
        """This and the one that averages replicas, if there is one."""
        return [self] if self.replicas is None else [self, self.replicas]

    def begin(self) -> None:
        """Start a step, for the replicas too."""
        super().begin()
        self._reduced.clear()
        if self.replicas is not None:
            self.replicas.begin()

    def finish(self, good: bool | Tensor | None = None) -> None:
        """End a step, for the replicas too. With feedback all ranks hear whether all are content with it."""
        syncs = self._syncs()
        if good is None:
            verdicts = [bool(sync.judge()) for sync in syncs]  # FSDP2 with feedback is on the CPU
            good = all(verdicts)
        if self.world_size > 1 and any(sync.has_feedback for sync in syncs):
            good = self._all_ranks(bool(good))
        super().finish(good)
        if self.replicas is not None:
            self.replicas.finish(good)

    def discard_step(self) -> None:
        """See `GradientSync.discard_step`; for the replicas too."""
        super().discard_step()
        if self.replicas is not None:
            self.replicas.discard_step()

    def abandon(self) -> None:
        """Forget a step that did not come to its end."""
        for sync in self._syncs():
            sync.feedback.finish(False)

    def _all_ranks(self, finite: bool) -> bool:
        """Whether it holds on all ranks."""
        flags = torch.zeros(self.world_size, wire.HEADER_BYTES + 1, dtype=torch.uint8)
        flags[self.rank, -1] = int(finite)
        header = wire.Header(2, self.rank, _FLAGS_BUCKET, self.step, 0)
        self.metrics.record(Event("wire_bytes", flags[0].numel() * (self.world_size - 1), self.step))
        rows = list(flags)
        self._drive(
            self._channels[1].post([rows[self.rank]] * self.world_size, rows, header) for _ in range(1)
        )
        return bool(flags[:, -1].all())

    def _drive(self, steps: Iterable[Pending]) -> None:
        """Run a collective to its end on this thread; on NCCL, enqueue it on the current stream."""
        if self.failure is not None:
            raise self.failure
        try:
            with torch.no_grad():
                for pending in steps:
                    pending.wait()
        except BaseException as error:
            self.fail(error)
            raise
