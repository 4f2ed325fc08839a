"""What works with plain DDP works with gradq: odd shapes, ignored and frozen parameters, copies, wrappers."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import gradq
from gradq.testing import run_ranks


def backward(model: nn.Module, rank: int, step: int = 0, width: int = 64) -> None:
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(100 * step + rank)
    model(torch.randn(6, width, generator=generator)).square().mean().backward()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


# --- every shape ----------------------------------------------------------------------------------------

SHAPES = [
    (),
    (0,),
    (1,),
    (3, 0),
    (0, 3),
    (40, 40),
    (2, 3, 4, 5, 6, 7),
    (1, 1),
    (1, 2000),
    (2000, 1),
    (5, 0, 7),
]
SPECS = ["none", "fp32", "bf16", "int8", "int4+int4", "topk", "powersgd:2", "powersgd:2+int8", "rot4", "nf4"]
SPECS += ["sign", "rot2", "mxfp4"]


class Shapes(nn.Module):
    """A sum over parameters of given shapes."""

    def __init__(self, shapes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x):
        return x.mean() * sum((part * part).sum() for part in self.parts)


def every(parameter: gradq.ParameterInfo) -> bool:
    """A predicate for `exact`: compress every parameter, the smallest too."""
    return False


def mapping():
    return {"parts.5": "int8", "parts.6": "topk", "*": "int4"}


def train_shapes(rank: int, collective: str, shapes) -> dict[str, float]:
    """The worst relative error of a mean over ranks, by spec."""
    rules = mapping() if (40, 40) in shapes else {"*": "int4"}
    bits = gradq.BitAllocation(bytes_of="int4", every=2, samples=1, exact=every)
    specs = {spec: spec for spec in SPECS} | {"rules": rules, "bits": bits}
    worst = {}
    for name, spec in specs.items():
        model = DistributedDataParallel(Shapes(shapes), bucket_cap_mb=0.01)
        handle = gradq.compress(model, spec, exact=() if name == "bits" else every, collective=collective)
        for step in range(3):
            model.zero_grad()
            model(torch.full((4,), 1.0 + rank + step)).backward()
        factor = 2 * sum(1.0 + r + 2 for r in range(dist.get_world_size())) / dist.get_world_size()
        for p in (own for own in model.parameters() if own.grad is not None):
            assert p.grad.shape == p.shape
            norm = float((factor * p.detach()).norm())
            off = float((p.grad - factor * p.detach()).norm()) / norm if norm else 0.0
            worst[name] = max(worst.get(name, 0.0), off)
        assert handle.stats(parameters=True).steps == 3
        assert "over" in repr(handle)
        handle.close()
    return worst


@pytest.mark.timeout(300)  # where no kernels are compiled yet, it compiles most of them
@pytest.mark.parametrize("shapes", [SHAPES, [()], [(0,)], [(3, 0), ()]], ids=str)
@pytest.mark.parametrize(("collective", "world_size"), [("direct", 2), ("two_phase", 3)])
def test_every_shape_with_every_spec(shapes, collective: str, world_size: int) -> None:
    bounds = {"none": 1e-6, "fp32": 1e-6, "bf16": 0.01, "int8": 0.02, "int4+int4": 0.3}
    results = run_ranks(train_shapes, world_size, collective, shapes, timeout=280)
    for worst in results:
        assert worst == results[0]
        for name, bound in bounds.items():
            assert worst[name] <= bound, name
        for name, off in worst.items():
            assert off < 2, name


# --- what DDP averages ----------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A gate that all ranks share and an expert of each rank's own, of another size."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(64, 64)
        torch.manual_seed(1 + rank)
        self.expert = nn.Sequential(nn.Linear(64, 32 * (rank + 1)), nn.Linear(32 * (rank + 1), 64))

    def forward(self, x):
        return self.expert(self.gate(x))


def ignored(rank: int, spec: str | None, inner: bool):
    model = Mixture(rank)
    names = [name for name, _ in model.named_parameters() if name.startswith("expert")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    stats = None
    if spec is not None and inner:
        handle = gradq.HookState(model, spec)
        wrapped.register_comm_hook(handle, gradq.hook)
    elif spec is not None:
        handle = gradq.compress(wrapped, spec)
    backward(wrapped, rank)
    if spec is not None:
        stats = list(handle.stats(parameters=True).parameters)
        handle.close()
    return [p.grad for p in model.gate.parameters()], [p.grad for p in model.expert.parameters()], stats


@pytest.mark.parametrize("inner", [False, True])
def test_ignored_parameters_are_left_alone(inner: bool) -> None:
    plain, compressed = run_ranks(ignored, 2, None, inner), run_ranks(ignored, 2, "fp32", inner)
    for rank in range(2):
        for kind in range(2):
            for want, got in zip(plain[rank][kind], compressed[rank][kind], strict=True):
                torch.testing.assert_close(got, want)
        assert compressed[rank][2] == ["gate.weight", "gate.bias"]


def frozen(rank: int, compress: bool):
    """Frozen and thawed before and after DDP was made and compressed, one layer each."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    model[1].requires_grad_(False)
    model[4].requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    model[0].requires_grad_(False)  # between: DDP goes on averaging it
    model[1].requires_grad_(True)  # between: DDP does not average it
    names, seen = [], []
    if compress:
        handle = gradq.compress(wrapped, "fp32")
        names = list(handle.stats(parameters=True).parameters)
    for step in range(4):
        if step == 1:
            model[2].requires_grad_(False)  # after
        if step == 2:
            model[0].requires_grad_(True)
            model[2].requires_grad_(True)
        backward(wrapped, rank, step)
        seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return seen, names


def test_frozen_parameters_are_treated_as_ddp_does() -> None:
    plain, compressed = run_ranks(frozen, 2, False), run_ranks(frozen, 2, True)
    assert compressed[0][1] == [f"{n}.{kind}" for n in (0, 2, 3) for kind in ("weight", "bias")]
    for (want, _), (got, _) in zip(plain, compressed, strict=True):
        for step in range(4):
            assert want[step].keys() == got[step].keys()
            for name, gradient in want[step].items():
                torch.testing.assert_close(got[step][name], gradient)


def tied(rank: int):
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False))
    model[2].weight = model[0].weight
    wrapped = DistributedDataParallel(model)
    handle = gradq.compress(wrapped, "int8")
    backward(wrapped, rank)
    names = list(handle.stats(parameters=True).parameters)
    handle.close()
    return names, gradients(model)


def test_tied_parameters_travel_once() -> None:
    (names, first), (_, second) = run_ranks(tied, 2)
    assert names == ["0.weight", "0.bias"]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- over which ranks -----------------------------------------------------------------------------------


def subgroups(rank: int, form: str):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own, other = groups[rank % 2], dist.new_group([0, 1]) if form == "wrong group" else None
    model = net(10 + rank % 2)
    if form == "state first":
        state = gradq.HookState(model, "int4")
        wrapped = DistributedDataParallel(model, process_group=own)
    else:
        if form == "wrapped before":
            DistributedDataParallel(model)
        wrapped = DistributedDataParallel(model, process_group=own)
        if form == "wrong group":
            try:
                gradq.compress(wrapped, "int4", group=dist.group.WORLD)
            except gradq.ConfigError as error:
                return str(error), other is None
        state = gradq.HookState(model if form != "ddp" else wrapped, "int4")
    wrapped.register_comm_hook(state, gradq.hook)
    try:
        backward(wrapped, rank)
    except gradq.ConfigError as error:
        return str(error), None
    return state.sync.world_size, gradients(model)


@pytest.mark.parametrize("form", ["ddp", "inner", "wrapped before"])
def test_a_state_averages_over_the_ranks_that_ddp_does(form: str) -> None:
    results = run_ranks(subgroups, 4, form)
    assert [size for size, _ in results] == [2, 2, 2, 2]
    for rank in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(results[rank][1], results[rank + 2][1], strict=True))
    assert not torch.equal(results[0][1][0], results[1][1][0])


def test_a_state_made_for_other_ranks_says_so_before_it_averages() -> None:
    for rank, (message, _) in enumerate(run_ranks(subgroups, 4, "state first")):
        assert "nothing was averaged" in message
        assert f"({rank % 2}, {rank % 2 + 2})" in message
        assert "group=" in message
    for message, _ in run_ranks(subgroups, 4, "wrong group"):
        assert "leave group= out" in message


# --- copies ---------------------------------------------------------------------------------------------


def copies(rank: int, compiled: bool):
    model = net()
    wrapped = DistributedDataParallel(torch.compile(model, backend="eager") if compiled else model)
    handle = gradq.compress(wrapped, "int4")
    backward(wrapped, rank)
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    made = {
        "deepcopy": copy.deepcopy(wrapped),
        "averaged": AveragedModel(wrapped).module,
        "saved": torch.load(file, weights_only=False),
        "state": pickle_of(handle),
    }
    rows = {}
    for kind in ("deepcopy", "averaged", "saved"):
        backward(made[kind], rank, 1)  # by DDP's own all-reduce
        rows[kind] = gradients(made[kind])
    again = gradq.compress(made["deepcopy"], "int8")
    backward(made["deepcopy"], rank, 2)
    counted = again.stats().steps
    again.close()
    backward(wrapped, rank, 3)  # the first goes on
    steps = handle.stats().steps
    handle.close()
    return rows, counted, steps, repr(made["state"])


def pickle_of(handle):
    file = io.BytesIO()
    torch.save({"handle": handle}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["handle"]


def plain_gradients(rank: int):
    wrapped = DistributedDataParallel(net())
    backward(wrapped, rank, 1)
    return gradients(wrapped)


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_of_a_compressed_model(compiled: bool) -> None:
    want = run_ranks(plain_gradients, 2)[0]
    for rows, counted, steps, shown in run_ranks(copies, 2, compiled):
        assert (counted, steps) == (1, 2)
        assert "compresses nothing" in shown
        for kind, got in rows.items():
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(b, a, msg=kind)


# --- wrappers -------------------------------------------------------------------------------------------


def under(wrapping: str, rank: int):
    model = net()
    if wrapping == "compiled inside":
        model = torch.compile(model, backend="eager")
    elif wrapping == "part compiled":
        model[2] = torch.compile(model[2], backend="eager")
    elif wrapping == "checkpointed":
        model[0] = checkpoint_wrapper(model[0])
    elif wrapping == "parametrized":
        parametrize.register_parametrization(model[2], "weight", nn.Identity())
    wrapped = DistributedDataParallel(model)
    outer = torch.compile(wrapped, backend="eager") if wrapping == "compiled outside" else wrapped
    handle = gradq.compress(outer, "int4", exact="_orig_mod.4.*" if "compiled" in wrapping else "4.*")
    for step in range(2):
        backward(outer, rank, step)
    names = list(handle.stats(parameters=True).parameters)
    kept = {
        name: handle.sync.feedback.local.current(name).clone() for name in handle.sync.feedback.local.names()
    }
    handle.close()
    return names, kept, gradients(wrapped)


WRAPPINGS = ("plain", "compiled inside", "part compiled", "compiled outside", "checkpointed", "parametrized")


def under_all(rank: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [under(wrapping, rank) for wrapping in WRAPPINGS]


def test_names_residuals_and_bytes_are_the_same_under_every_wrapper() -> None:
    for results in run_ranks(under_all, 2):
        names, kept, reduced = results[0]
        assert names == [f"{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")]
        assert list(kept) == ["0.weight", "2.weight"]
        for wrapping, (other_names, other_kept, other_reduced) in zip(WRAPPINGS, results, strict=True):
            assert sorted(other_names) == sorted(names), wrapping
            for name, residual in kept.items():
                torch.testing.assert_close(other_kept[name], residual, msg=f"{wrapping} {name}")
            by_shape = sorted(other_reduced, key=lambda g: (g.shape, float(g.sum())))
            for a, b in zip(sorted(reduced, key=lambda g: (g.shape, float(g.sum()))), by_shape, strict=True):
                torch.testing.assert_close(a, b, msg=wrapping)


# --- nothing to compress, nothing asked for -------------------------------------------------------------


def small(rank: int, dtype: torch.dtype):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("gradq").addHandler(handler)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype))
    handle = gradq.compress(model, "int8")
    model(torch.ones(2, 16, dtype=dtype)).sum().backward()
    ratio = handle.stats().ratio
    handle.set_spec("int4")
    handle.close()
    return lines, ratio


def test_a_plan_that_compresses_nothing_says_one_line_and_sends_no_more() -> None:
    first, second = run_ranks(small, 2, torch.float32)
    assert [line.split(" of the ")[0] for line in first[0]] == [
        "int8 compresses none",
        "int4 compresses none",
    ]
    assert "plain all-reduce" in first[0][0]
    assert not second[0], "one line for all ranks"
    assert first[1] == second[1] == 1.0
    assert len(run_ranks(small, 2, torch.bfloat16)[0][0]) == 2


def sparse(rank: int, later: str):
    model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Flatten(), nn.Linear(128, 4))
    wrapped = DistributedDataParallel(model)
    handle = gradq.compress(wrapped, "none")
    try:
        handle.set_spec(later)
    except gradq.UnsupportedError as error:
        return str(error)
    return "no error"


def test_a_sparse_model_takes_none_and_nothing_else() -> None:
    for message in run_ranks(sparse, 2, "int8"):
        assert "'0'" in message
        assert 'or the spec "none"' in message
    assert run_ranks(sparse, 2, "none") == ["no error", "no error"]


def one_rank_only(rank: int):
    handle = gradq.compress(DistributedDataParallel(net()), "int8")
    try:
        handle.set_spec("int9" if rank else "int4")
    except gradq.GradqError as error:
        return f"{type(error).__name__}: {error}", str(handle.spec)
    return "no error", ""


def test_a_rank_that_cannot_change_its_spec_tells_the_others() -> None:
    first, second = run_ranks(one_rank_only, 2)
    assert first[0].startswith("MismatchError: rank 1 cannot change its spec: no codec is called 'int9'")
    assert second[0].startswith("SpecError: no codec is called 'int9'")
    assert first[1] == second[1] == "int8"
