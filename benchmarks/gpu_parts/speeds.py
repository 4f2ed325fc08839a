"""Kernel speeds as shares of a copy's bandwidth, with and without a short last tile; see `gpu_kernels`."""

from __future__ import annotations

import multiprocessing as mp
from functools import partial

import torch
from gpu_kernels import codec_rows, exact_rows, interleaved_ms, measure
from torch import Tensor

from gpu_parts.setting import Setting
from gradq.codecs import from_spec

__all__ = ["speeds_1gb", "speeds_100mb"]

ROTATED = ("rot4", "rot3", "rot2(levels=scalar)", "rot1(levels=scalar)")
SPECS = ("int8", "int4", "int3", "int2", *ROTATED)
TILE = 4096
SHORT = 2112  # elements of a last tile


def speeds_100mb(setting: Setting) -> None:
    """At 100 MB, without a short last tile; then with one, codecs alone."""
    tiles = 1 if setting.dry_run else 6104
    _speeds(setting, tiles * TILE, rounds=1 if setting.dry_run else 31)
    _speeds(
        setting, (tiles - 1) * TILE + (300 if setting.dry_run else SHORT), rounds=1 if setting.dry_run else 21
    )


def speeds_1gb(setting: Setting) -> None:
    """At 1 GB, where a last tile and the launch cost nothing that can be seen."""
    tiles = 1 if setting.dry_run else 61_036
    _speeds(setting, tiles * TILE, rounds=1 if setting.dry_run else 9)


def _speeds(setting: Setting, n: int, rounds: int) -> None:
    specs = ("int3", "rot2(levels=scalar)") if setting.dry_run else SPECS
    short = bool(n % TILE)
    if not setting.dry_run:  # kernels are compiled by several processes into one cache
        with mp.get_context("spawn").Pool(min(setting.processes, len(specs))) as pool:
            pool.map_async(partial(_compile, setting, n % TILE), specs, chunksize=1).get(
                max(1, setting.left - 5)
            )
    x, residual, new, out = _tensors(setting, n)
    with setting.on_device():
        rows = [] if setting.dry_run or short else exact_rows(x, out)
        for spec in specs:
            rows += codec_rows(from_spec(spec), x, residual, new, out)
        if setting.dry_run:
            rows = [row for row in rows if "of 8" not in row[0] and "of 4" not in row[0]]
        for row in measure(x, out, rows, rounds):
            setting.add(numel=n, short_last_tile=short, **row)


def _tensors(setting: Setting, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(setting.device).manual_seed(0)
    x = torch.randn(n, generator=generator, device=setting.device) * 1e-3
    return x, x * 1e-2, torch.zeros_like(x), torch.zeros_like(x)


def _compile(setting: Setting, rest: int, spec: str) -> None:
    with setting.on_device():
        rows = codec_rows(from_spec(spec), *_tensors(setting, 2 * TILE + rest))
        interleaved_ms({name: call for name, _, _, call in rows}, setting.device, 1)
