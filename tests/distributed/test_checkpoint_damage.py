"""Broken states and damaged files: an error of ours on all ranks, and nothing changes."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import equal, save, trained
from test_contracts import make, residuals

import gradq
import gradq.checkpoint.state
from gradq.testing import run_ranks

RAW = re.compile(r"\b(Key|Type|Attribute|Index|Value|Runtime|Assertion|Overflow|Unicode\w+)Error\b")

# --- mutations of a state ---------------------------------------------------------------------------------

ODD = [
    lambda: None,
    list,
    dict,
    lambda: "12",
    lambda: b"12",
    lambda: -1,
    lambda: 0,
    lambda: 1 << 70,
    lambda: 2.5,
    lambda: True,
    lambda: float("nan"),
    lambda: object(),
    lambda: torch.tensor(-1),
    lambda: torch.tensor(1 << 62),
    lambda: torch.tensor(2.0),
    lambda: torch.tensor(True),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 0),
    lambda: torch.zeros(2, 3500),
    lambda: torch.zeros(2, 3500, dtype=torch.complex64),
    lambda: torch.zeros(2, 3500, dtype=torch.int32),
    lambda: torch.full((2, 3500), float("inf")),
    lambda: torch.zeros(2, 3500, device="meta"),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.frombuffer(bytearray(b'{"spec": 1, "most": 4}'), dtype=torch.uint8),
    lambda: torch.frombuffer(
        bytearray(b'{"spec": "", "most": 1, "local": {"0.weight": -1}, "shard": {}, "bases": {}}'),
        dtype=torch.uint8,
    ),
    lambda: torch.arange(7, dtype=torch.uint8),
]


def paths_of(value: object, path: tuple = ()) -> list[tuple]:
    """The places of everything in a nested dictionary, itself included."""
    deeper = value.items() if isinstance(value, dict) else ()
    return [path, *(found for key, entry in deeper for found in paths_of(entry, (*path, key)))]


def mutate(state: dict, chance: random.Random) -> object:
    """The state with one thing wrong, or with one thing that only looks so."""
    state = copy.deepcopy(state)
    path = chance.choice(paths_of(state))
    if not path:
        return chance.choice(ODD)()
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    value = parent[path[-1]]
    how = chance.choice(["drop", "odd", "odd", "extra", "rename", "swap", "element", "dtype", "shape"])
    if how == "drop":
        del parent[path[-1]]
    elif how == "odd":
        parent[path[-1]] = chance.choice(ODD)()
    elif how == "extra":
        parent[chance.choice(["more", "0.weight", 7, None, ""])] = chance.choice([value, *(o() for o in ODD)])
    elif how == "rename":
        parent[chance.choice(["more", "1", "_orig_mod.0.weight", ""])] = parent.pop(path[-1])
    elif how == "swap":
        other = chance.choice(list(parent))
        parent[path[-1]], parent[other] = parent[other], value
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        if how == "element" and value.numel():
            flat = value.reshape(-1).clone()
            odd = [float("nan"), float("inf"), 1e30] if value.is_floating_point() else [0, 1, 99]
            flat[chance.randrange(flat.numel())] = chance.choice(odd)
            parent[path[-1]] = flat.reshape(value.shape)
        elif how == "dtype":
            parent[path[-1]] = value.to(
                chance.choice([torch.float16, torch.float64, torch.int64, torch.bool])
            )
        else:
            shapes = [
                value[None],
                value.reshape(-1),
                value.reshape(-1)[:-1],
                value.repeat(2, *[1] * value.dim()),
            ]
            parent[path[-1]] = chance.choice(shapes)
    return state


def of_format_1(state: dict, handle: gradq.HookState) -> dict:
    """The gathered state as the first format had it: an entry a parameter."""
    old = {key: state[key] for key in ("step", "world_size", "rank")} | {
        "format": torch.tensor(1),
        "bases": {},
    }
    start = {"local": 0, "shard": 0}
    numels = dict(zip(("local", "shard"), gradq.checkpoint.state.residual_shapes(handle.sync), strict=True))
    for kind, start in (("local", 0), ("shard", 0)):
        old[kind] = {}
        for name, numel in numels[kind].items():
            old[kind][name] = state[kind]["0"][:, start : start + numel].clone()
            start += numel
    return old


def refusal(handle: gradq.HookState, state: object) -> str:
    """What is said when it cannot be loaded, "" if it is."""
    try:
        handle.load_state_dict(state)
    except gradq.CheckpointError as error:
        return str(error)
    return ""


def broken_states(rank: int, count: int) -> dict[str, int]:
    """Load mutations on all ranks or on rank 1; only CheckpointErrors come, and then nothing changes."""
    logging.getLogger("gradq").setLevel(logging.ERROR)
    _, handle, _ = trained(rank, "int4+int4", 3, {})
    holder = [handle.gathered_state_dict()]
    torch.distributed.broadcast_object_list(holder)
    good = {"2": holder[0], "1": of_format_1(holder[0], handle)}
    for state in good.values():  # both load as they are
        want = residuals(handle)
        handle.sync.feedback.local.clear()
        handle.load_state_dict(state)
        assert equal(residuals(handle), want)
    outcomes = {"refused": 0, "loaded": 0}
    for seed in range(count):
        chance = random.Random(seed)
        state = mutate(good[chance.choice("12")], chance)
        if chance.random() < 0.5 and rank == 0:
            state = good["2"]
        before, step = residuals(handle), handle.sync.step
        message = refusal(handle, state)
        outcomes["refused" if message else "loaded"] += 1
        assert not RAW.search(message) or "damaged" in message, f"{seed}: {message}"
        if message:
            assert equal(residuals(handle), before), seed
            assert handle.sync.step == step, seed
        assert all(torch.isfinite(residual).all() for residual in residuals(handle).values()), seed
    handle.load_state_dict(good["2"])
    handle.close()
    return outcomes


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_broken_state_is_a_checkpoint_error_on_all_ranks(count: int) -> None:
    first, second = run_ranks(broken_states, 2, count, timeout=300 if count < 1000 else 3000)
    assert first == second, "ranks went different ways"
    assert first["refused"] > count // 2
    assert first["loaded"] > 0


def fuzzed_state(rank: int) -> int:
    """The same on one rank that loads a state of two, with Hypothesis choosing, and shrinking."""
    logging.getLogger("gradq").setLevel(logging.ERROR)
    handle = gradq.compress(make(), "int4")
    numels = gradq.checkpoint.state.residual_shapes(handle.sync)[0]
    rows = {name: torch.randn(2, numel) for name, numel in numels.items()}
    scalars = {"format": 1, "step": 4, "world_size": 2}
    good = {name: torch.tensor(value) for name, value in scalars.items()}
    good |= {"rank": torch.arange(2)[:, None], "local": rows, "shard": {}}
    refused = 0

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(chance: random.Random) -> None:
        nonlocal refused
        before = residuals(handle)
        message = refusal(handle, mutate(good, chance))
        assert not RAW.search(message), message
        if message:
            assert equal(residuals(handle), before)
            refused += 1
        assert all(torch.isfinite(residual).all() for residual in residuals(handle).values())

    check()
    handle.close()
    return refused


def test_hypothesis_finds_no_other_error() -> None:
    assert run_ranks(fuzzed_state, 1)[0] > 50


def refused_by_name(rank: int) -> list[str]:
    """What is said of a NaN on one rank, of a flipped bit, and of ranks that load different steps."""
    _, handle, _ = trained(rank, "int4", 3, {})
    holder = [handle.gathered_state_dict()]
    torch.distributed.broadcast_object_list(holder)
    good, messages = holder[0], list[str]()
    nan, bit, step = copy.deepcopy(of_format_1(good, handle)), copy.deepcopy(good), copy.deepcopy(good)
    nan["local"]["2.weight"][1, 17] = float("nan")
    bit["local"]["0"][1].view(torch.int32)[5000] ^= 1
    step["step"] += rank
    for state in (nan, bit, step, of_format_1(step, handle), None if rank else good):
        messages.append(refusal(handle, state))
    handle.close()
    return messages


def test_refusals_name_parameter_and_rank_on_every_rank() -> None:
    for nan, bit, step, old_step, nothing in run_ranks(refused_by_name, 2):
        assert "local residual of '2.weight' of rank 1 has NaN or Inf" in nan
        assert "local residual of '2.weight' of rank 1 is damaged" in bit
        assert "another digest than rank 1 saved" in step
        assert "step is 3 on rank 0 and 4 on rank 1" in old_step
        assert "got NoneType; every rank loads it" in nothing


# --- damaged files ----------------------------------------------------------------------------------------


def damage(folder: Path, what: str, chance: random.Random) -> str:
    """Do something to a checkpoint; returns the name that the message must have, "" if none must be."""
    metadata, shard = folder / ".metadata", folder / "__1_0.distcp"
    if what == "no metadata":
        metadata.unlink()
        return "no .metadata"
    if what == "torn metadata":
        metadata.write_bytes(metadata.read_bytes()[: chance.randrange(metadata.stat().st_size)])
        return ".metadata"
    if what == "foreign metadata":
        metadata.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
        return ".metadata"
    if what == "no shard":
        shard.unlink()
        return "__1_0.distcp is missing"
    if what == "torn shard":
        shard.write_bytes(shard.read_bytes()[: chance.randrange(shard.stat().st_size)])
        return "__1_0.distcp"
    if what == "file":
        shutil.rmtree(folder)
        torch.save({"gradq": 1}, folder)
        return "it is a file"
    data = bytearray(shard.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    shard.write_bytes(data)
    return ""


DAMAGES = ["no metadata", "torn metadata", "foreign metadata", "no shard", "torn shard", "file"]


def load_damaged(rank: int, folder: str, wanted: list[str]):
    """Load each, between two good loads."""
    logging.getLogger("gradq").setLevel(logging.ERROR)
    handle = gradq.compress(make(), "int4+int4", collective="two_phase")
    gradq.load_checkpoint(handle, f"{folder}/good")
    want, refused = residuals(handle), 0
    for number, name in enumerate(wanted):
        handle.sync.feedback.local.clear()
        before, message = residuals(handle), ""
        try:
            gradq.load_checkpoint(handle, f"{folder}/{number}")
        except gradq.CheckpointError as error:
            message = str(error)
        assert name in message
        assert equal(residuals(handle), before if message else want), f"{number}: damage was loaded"
        if message:
            assert f"{folder}/{number}" in message
            refused += 1
    gradq.load_checkpoint(handle, f"{folder}/good")
    assert equal(residuals(handle), want)
    handle.close()
    return refused


def test_damaged_files_are_named_and_never_loaded(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path / "good"), "int4+int4", {})
    names = []
    for number, what in enumerate([*DAMAGES, "torn metadata", "torn shard", *["flip"] * 60]):
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        names.append(damage(tmp_path / str(number), what, random.Random(number)))
    first, second = run_ranks(load_damaged, 2, str(tmp_path), names)
    assert first == second
    assert first > 40, "flips in a file of residuals must be found"
