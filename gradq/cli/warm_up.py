"""`gradq warm-up`: compile the CPU kernels of some specs now, so that no training run has to."""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

from gradq.kernels.loader import backend_name
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.plan import ResolvedPlan

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
    by_name = {
        name: ParameterInfo(name=name, shape=shape, dtype=torch.float32, index=index, world_size=world_size)
        for index, (name, shape) in enumerate(shapes.items())
    }
    for text in specs:
        start = time.perf_counter()
        policy = FixedPolicy(spec=Spec.parse(text))
        ResolvedPlan.of(policy, text, by_name, SyncConfig(), world_size).warm_up(_CPU)
        typer.echo(f"{text}: ready after {time.perf_counter() - start:.1f} s")
    folder = folders()[1]
    if folder is None:
        typer.echo("nothing could be kept: set NUMBA_CACHE_DIR to a folder that can be written", err=True)
        raise typer.Exit(1)
    typer.echo(f"kept in {folder}")
