"""Every Triton kernel against the CPU's: the same bytes, the same residuals, the same means.

Three parts: `kernels`, all codecs in their own form on awkward sizes; `table`, the table of the CPU kernels'
tests (tests/unit/test_kernels.py), with all block sizes and scales; `contract`, the checks of
`gradq.conformance`. Each is a list of tasks, the fastest first, that several processes take from.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing as mp
import random
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_parts.setting import Setting
from gradq import rng
from gradq.codecs import from_spec
from gradq.conformance import CHECKS
from gradq.rng import EncodeContext

__all__ = ["contract", "kernels", "table"]

ROTATED = ("rot1(levels=scalar)", "rot2(levels=scalar)", "rot3", "rot4", "rot4(scale=mse)", "rot5", "rot6")
EXACT = ("fp32", "bf16", "fp16")
SPECS = (*EXACT, "int8", "int4", "int3", "int2", *ROTATED, "int5", "int6", "int7")
SIZES = (1, 7, 255, 257, 1000, 4095, 4096, 4097, 100_003)  # the last: more blocks than one program takes
MEANS = (2, 3, 8)
TESTS = Path(__file__).parents[2] / "tests" / "unit"
CHEAP = ("configuration", "sizes", "memory", "determinism", "values", "nonfinite", "residual_zero")

Task = Callable[[Setting], int]  # the number of comparisons


def kernels(setting: Setting) -> None:
    """All codecs in their own form."""
    specs, sizes = SPECS, SIZES
    if setting.dry_run:
        specs, sizes = ("bf16", "int3", "rot2(levels=scalar)"), (257,)
    tasks = [
        (f"{spec}, {n} elements", partial(_codec, spec, n)) for n, spec in itertools.product(sizes, specs)
    ]
    _run(setting, tasks)


def table(setting: Setting) -> None:
    """The table of the CPU kernels' tests; small blocks are compiled and run the fastest."""
    blocks, bits = (256, 64, 128, 1024, 72, 264, 1000), (4, 8, 3, 2, 5, 6, 7)
    if setting.dry_run:
        blocks, bits = (72,), (3,)
    tasks = [
        (f"{b} bits, blocks of {block}", partial(_table_rows, b, block))
        for block, b in itertools.product(blocks, bits)
    ]
    _run(setting, tasks)


def contract(setting: Setting) -> None:
    """The codecs' contract on the device."""
    checks = sorted(CHECKS, key=lambda name: (name not in CHEAP, name in ("unbiased", "contractive")))
    specs = [spec for spec in SPECS if spec not in ("fp32", "fp16")]
    if setting.dry_run:
        checks, specs = checks[:2], ["bf16"]
    tasks = [
        (f"{check} of {spec}", partial(_contract_row, check, spec))
        for check, spec in itertools.product(checks, specs)
    ]
    _run(setting, tasks)


def _run(setting: Setting, tasks: list[tuple[str, Task]]) -> None:
    """Give the tasks to processes; a row for what failed, and one for all.

    Raises:
        AssertionError: a task failed.
    """
    context = mp.get_context("spawn")
    done = failed = compared = 0
    with context.Pool(min(setting.processes, len(tasks))) as pool:
        results = pool.imap_unordered(partial(_attempt, setting), tasks)
        while done < len(tasks):
            try:
                name, count, error = results.next(timeout=max(0.1, setting.left - 5))
            except mp.TimeoutError:
                break
            done, compared = done + 1, compared + count
            if error:
                failed += 1
                setting.add(task=name, error=error)
        pool.terminate()
    setting.add(summary=True, tasks=len(tasks), done=done, failed=failed, comparisons=compared)
    assert not failed, f"{failed} of {done} tasks failed, see the rows with an error"
    assert done == len(tasks), f"{done} of {len(tasks)} tasks ended in time, none failed"


def _attempt(setting: Setting, task: tuple[str, Task]) -> tuple[str, int, str]:
    torch.set_num_threads(1)
    name, check = task
    try:
        return name, check(setting), ""
    except BaseException as error:  # also pytest's, which tests raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, 0, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:2000]


def _same(what: str, ours: Tensor, truth: Tensor) -> None:
    """Equal bits; a NaN that a GPU computed has bits of its own.

    Raises:
        AssertionError: they are not.
    """
    ours = ours.cpu()
    if ours.is_floating_point():
        ours = torch.where(ours.isnan(), math.nan, ours)
        truth = torch.where(truth.isnan(), math.nan, truth)
    differ = (ours.view(torch.uint8) != truth.view(torch.uint8)).nonzero().flatten()
    assert not len(differ), f"{what}: {len(differ)} bytes differ, the first at {differ[:5].tolist()}"


def _codec(spec: str, n: int, setting: Setting) -> int:
    """A codec through its own door, as collectives call it, at an aligned and at an odd address."""
    count, draw = 0, torch.Generator().manual_seed(n)
    exact, means = spec in EXACT, MEANS[:1] if setting.dry_run else MEANS
    values = torch.randn(n, generator=draw) * torch.exp(4 * torch.randn(n, generator=draw))
    values[n // 2] = 0.0
    for kind, offset, feedback in itertools.product(("plain", "nan"), (0, 1), (False, True)):
        if setting.dry_run and (kind, offset, feedback) not in (("plain", 0, False), ("nan", 1, True)):
            continue
        codec, x = from_spec(spec).for_feedback(feedback), values.clone()
        if kind == "nan":
            x[n // 3] = math.nan
        takes = feedback and not exact
        key = rng.dither_key(1, 2, 3, 1)
        context = EncodeContext(key=key, shift=rng.dither_shift(1, 3), first_block=2, loss_scale=4.0)
        size, results = codec.nbytes(n), []
        for there in (False, True):
            device = setting.device if there else torch.device("cpu")
            old = _moved(0.1 * values.flip(0), offset, device)
            new = torch.zeros(n, device=device)
            given: dict[str, Any] = {"residual": old, "new_residual": new} if takes else {}
            stride = -(-size // 16) * 16 + offset * (8 if exact else 1)
            rows = torch.zeros(max(means), stride, dtype=torch.uint8, device=device)
            outs = []
            with setting.on_device() if there else contextlib.nullcontext():
                for row in rows[:, :size]:
                    codec.encode(_moved(x, offset, device), row, context=context, **given)
                for world_size in (1, *means):
                    outs.append(_moved(torch.zeros(n), offset, device))
                    codec.decode_mean(rows[:world_size, :size], outs[-1])
                outs.append(torch.zeros(n, device=device))
                codec.decode(rows[0, :size], outs[-1])
            results.append([rows[0, :size], new, *outs])
        names = ["payload", "residual", *(f"mean of {k}" for k in (1, *means)), "decoded"]
        for what, truth, ours in zip(names, *results, strict=True):
            if what == "payload" and kind == "nan" and exact:
                continue  # torch's own cast, with NaNs of the device's own
            _same(f"{what}, {kind}, offset {offset}, feedback {feedback}", ours, truth)
            count += 1
    return count


def _moved(x: Tensor, offset: int, device: torch.device) -> Tensor:
    return torch.cat((torch.zeros(offset), x)).to(device)[offset:]


def _table_rows(num_bits: int, block_size: int, setting: Setting) -> int:
    sys.path.insert(0, str(TESTS))
    import test_kernels as cases

    from gradq.codecs.exact import cuda

    draw, count = random.Random(block_size + num_bits), 0
    for n in cases.LENGTHS[-1:] if setting.dry_run else cases.LENGTHS:
        if setting.left < 5:
            break
        chosen = (draw.choice(cases.SCALES), draw.choice(cases.CONTENTS), draw.choice(cases.RESIDUALS))
        stochastic = draw.random() < 0.5
        device = setting.device.type
        cases.check_case(n, num_bits, block_size, *chosen, stochastic, draw, kernels=cuda, device=device)
        count += 1
    return count


def _contract_row(check: str, spec: str, setting: Setting) -> int:
    start = time.time()
    with setting.on_device(), setting.device:
        CHECKS[check](from_spec(spec))
    if time.time() - start > 20:
        setting.add(task=f"{check} of {spec}", seconds=round(time.time() - start, 1))
    return 1
