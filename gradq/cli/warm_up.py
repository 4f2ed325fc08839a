"""`gradq warm-up`: compile the CPU kernels of some specs now, so that no training run has to."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated

import torch
import typer

from gradq.collectives import choose
from gradq.kernels.ops import backend_name
from gradq.kernels.turns import in_turns
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.policy.warm_up import warm_up_calls

__all__ = ["warm_up"]

_CPU = torch.device("cpu")


def warm_up(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="what runs will use: int4, rot4, int8+int8, ..."),
    ],
    world_size: Annotated[int, typer.Option(help="ranks of the runs: the bits of means depend on it")] = 2,
) -> None:
    """Compile the CPU kernels of some specs and keep them: for an image, or before the ranks start.

    They are kept in NUMBA_CACHE_DIR, or else beside gradq's sources, or else in the user's cache folder, for
    processors of this machine's kind.
    """
    if backend_name(_CPU) != "numba":
        raise typer.BadParameter(f"GRADQ_KERNELS={backend_name(_CPU)!r} compiles nothing; unset it")
    from gradq.kernels.numba_cache import folders

    # one parameter large enough for the codec of the spec, and one that travels exact
    shapes = {"matrix": (4096, 4096), "bias": (8,)}
    parameters = [
        ParameterInfo(name=name, shape=shape, dtype=torch.float32, index=index, world_size=world_size)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    for text in specs:
        start = time.perf_counter()
        plan = FixedPolicy(spec=Spec.parse(text)).plan(parameters)
        plain = choose("auto", world_size)
        collectives = {choose(e.resolve("auto"), world_size, plain=plain) for e in plan.values()}
        calls = warm_up_calls(plan, _CPU, world_size) + [partial(c.warm_up, _CPU) for c in collectives]
        in_turns(calls)
        typer.echo(f"{text}: ready after {time.perf_counter() - start:.1f} s")
    folder = folders()[1]
    if folder is None:
        typer.echo("nothing could be kept: set NUMBA_CACHE_DIR to a folder that can be written", err=True)
        raise typer.Exit(1)
    typer.echo(f"kept in {folder}")
