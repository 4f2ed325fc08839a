"""Does the host wait for the GPU inside gradq's hook? A profiler's trace of one step says so.

The claim is about NCCL. Where there are not two GPUs, NCCL has no two ranks, so the exchange is replaced by a
copy on the device: each rank receives what it sends. All else is gradq's: hook, stream, kernels, residuals.
Over Gloo messages go through host memory, which has to wait; that is counted too, and no claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_parts.ranks import Contender, gpt, group_on_device, on_the_cuda_way, tokens
from gpu_parts.setting import Setting
from gpu_parts.trace import read_trace, waits_inside
from gradq.testing import run_ranks
from gradq.transport.streams import StagedChannel

__all__ = ["waits"]

RANGE = "gradq.hook"


class _Done:
    def wait(self) -> None:
        """The current stream has it already."""


def _echo(channel: object, send: Sequence[Tensor], receive: Sequence[Tensor], header: Any) -> _Done:
    """Every peer sends what it is sent, by a copy on the device."""
    for peer in range(len(send)):
        if peer != header.sender:
            size = min(receive[peer].numel(), send[peer].numel())
            receive[peer][:size].copy_(send[peer][:size], non_blocking=True)
    return _Done()


def waits(setting: Setting) -> None:
    """Trace a step of some codecs, after others.

    Raises:
        AssertionError: the host waits in the hook, or the trace does not show the hook.
    """
    run_ranks(_waits, 2, setting, timeout=max(5.0, setting.left - 3))


def _waits(rank: int, setting: Setting) -> None:
    several = not setting.dry_run and torch.cuda.device_count() >= 2
    on_the_cuda_way("staged", setting)
    group = group_on_device("nccl" if several else "gloo", setting)
    specs = ("int4",) if setting.dry_run else ("none", "bf16", "int8", "int4", "rot4")
    wrong = []
    for spec in specs:
        exchange = "NCCL" if several else "copy on the device"
        with mock.patch.object(StagedChannel, "post", _echo):
            found = _trace(rank, setting, spec, group)
        if rank == 0:
            setting.add(spec=spec, exchange=exchange, **vars(found))
        if not found.ranges:
            wrong.append(f"{spec}: the trace has no range {RANGE!r}")
        if not setting.dry_run and not found.calls:
            wrong.append(f"{spec}: the trace has no CUDA calls inside the hook")
        if found.waits and spec != "none":
            wrong.append(f"{spec}: the host waits in the hook: {found.waits}")
    if not several:
        found = _trace(rank, setting, "int4", group)
        if rank == 0:
            setting.add(spec="int4", exchange="Gloo, through host memory: it has to wait", **vars(found))
    assert not wrong, wrong


def _trace(rank: int, setting: Setting, spec: str, group: dist.ProcessGroup) -> Any:
    with setting.on_device():
        contender = Contender(spec, gpt("25m", setting).to(setting.device), group)
        handle = contender.handle
        assert handle is not None
        average = handle.average

        def inside_a_range(bucket: Any) -> Any:
            with record_function(RANGE):
                return average(bucket)

        activities = [ProfilerActivity.CPU, *([] if setting.dry_run else [ProfilerActivity.CUDA])]
        path = setting.folder / f"trace-{rank}.json"
        with mock.patch.object(handle, "average", inside_a_range):
            last = 1 if setting.dry_run else 2
            for step in range(last + 1):
                batch = tokens(rank, step, setting).to(setting.device)
                setting.synchronize()
                dist.barrier()
                if step < last:
                    contender.step(batch)
                    continue
                with profile(activities=activities) as profiler:
                    contender.step(batch)
                    setting.synchronize()
        contender.close()
    profiler.export_chrome_trace(str(path))
    found = waits_inside(read_trace(path), RANGE)
    path.unlink()
    return found
