"""FSDP2: a step is one outermost backward, whatever runs inside it and wherever `fully_shard` stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradq
from gradq.testing import run_ranks

WIDTH, STEPS = 40, 3


class Poison(torch.autograd.Function):
    """Identity forward; backward gives NaN if asked."""

    @staticmethod
    def forward(ctx, x, on):
        ctx.on = on
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan") if ctx.on else gradient, None


class Block(nn.Module):
    """A layer that can be poisoned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.poison = nn.Linear(WIDTH, WIDTH), False

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(Poison.apply(self.layer(x), self.poison))


class Net(nn.Module):
    """Blocks in a row; `how` says how each is called, `order` which one when."""

    def __init__(self, how: str = "", order: tuple[int, ...] = (0, 1, 2), head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH) if head else nn.Identity()
        self.how, self.order = how, order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.call(self.blocks[index], x)
        return self.head(x)

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.how == "reentrant":
            return checkpoint(block, x, use_reentrant=True)
        if self.how == "reentrant twice":
            return checkpoint(lambda y: checkpoint(block, y, use_reentrant=True) + y, x, use_reentrant=True)
        if self.how == "checkpointed":
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


def shard(model: Net, where: str) -> Net:
    """Apply fully_shard to the parts that where names."""
    from torch.distributed.fsdp import fully_shard

    for index, block in enumerate(model.blocks):
        if "blocks" in where or str(index) in where:
            fully_shard(block)
    if "root" in where:
        fully_shard(model)
    return model


def loss_of(model: nn.Module, rank: int, step: int, needs_gradient: bool = True) -> Tensor:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x.requires_grad_(needs_gradient)).square().mean()


def once(model: Net, rank: int, step: int) -> None:
    loss_of(model, rank, step).backward()


def plain_input(model: Net, rank: int, step: int) -> None:
    """The first block has no input that requires a gradient: FSDP reduces it at the end of the backward."""
    loss_of(model, rank, step, needs_gradient=False).backward()


def accumulated(model: Net, rank: int, step: int) -> None:
    for micro in range(2):
        for block in model.blocks:
            block.set_requires_gradient_sync(micro == 1)
        loss_of(model, rank, 10 * step + micro).backward()


def two_losses(model: Net, rank: int, step: int) -> None:
    """One backward of a sum, over two forwards."""
    (loss_of(model, rank, step) + loss_of(model, rank, 50 + step)).backward()


def penalty(model: Net, rank: int, step: int) -> None:
    """A double backward: the loss holds the gradient of another."""
    for part in [*model.blocks, model]:  # FSDP frees the parameters otherwise, which the second one needs
        part.set_reshard_after_forward(False)
        part.set_reshard_after_backward(False)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank)).requires_grad_()
    out = model(x).square().mean()
    (slope,) = torch.autograd.grad(out, x, create_graph=True)
    (out + slope.square().sum()).backward()
    for part in [*model.blocks, model]:
        part.reshard()


def inside_another(model: Net, rank: int, step: int) -> None:
    """A backward that the user starts in a hook of another one."""
    outer = torch.ones(3, requires_grad=True)
    outer_loss = (2 * outer).sum()
    hidden = outer_loss.grad_fn

    def nested(*unused: Any) -> None:
        with torch.enable_grad():
            loss_of(model, rank, step).backward()

    handle = hidden.register_hook(nested)
    outer_loss.backward()
    handle.remove()


# name: (how blocks are called, in which order, where fully_shard stands, one training step, head)
KINDS: dict[str, tuple[str, tuple[int, ...], str, Callable[[Net, int, int], None], bool]] = {
    "plain": ("", (0, 1, 2), "blocks, root", once, True),
    "reentrant": ("reentrant", (0, 1, 2), "blocks, root", once, False),
    "reentrant, root with parameters": ("reentrant", (0, 1, 2), "blocks, root", once, True),
    "reentrant, no root": ("reentrant", (0, 1, 2), "blocks", once, False),
    "reentrant in reentrant": ("reentrant twice", (0, 1, 2), "blocks, root", once, True),
    "reentrant in reentrant, no root": ("reentrant twice", (0, 1, 2), "blocks", once, False),
    "reentrant, accumulated": ("reentrant", (0, 1, 2), "blocks", accumulated, False),
    "reentrant, a shared block": ("reentrant", (0, 1, 0, 2, 0), "blocks, root", once, True),
    "checkpointed": ("checkpointed", (0, 1, 2), "blocks, root", once, True),
    "checkpointed, no root": ("checkpointed", (0, 1, 2), "blocks", plain_input, False),
    "a shared block": ("", (0, 1, 0, 2, 0), "blocks, root", once, True),
    "a shared block, no root": ("", (0, 1, 0, 2), "blocks", once, False),
    "no root": ("", (0, 1, 2), "blocks", once, False),
    "no root, plain input": ("", (0, 1, 2), "blocks", plain_input, False),
    "plain input": ("", (0, 1, 2), "blocks, root", plain_input, True),
    "one part": ("", (0, 1, 2), "1", once, False),
    "accumulated": ("", (0, 1, 2), "blocks", accumulated, False),
    "two losses": ("", (0, 1, 2), "blocks, root", two_losses, True),
    "two losses, no root": ("", (0, 1, 2), "blocks", two_losses, False),
    "double backward": ("", (0, 1, 2), "blocks, root", penalty, True),
    "inside another backward": ("", (0, 1, 2), "blocks", inside_another, False),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Shards (and whole ones of parts that are not sharded) by name."""
    return {
        name: getattr(p.grad, "_local_tensor", p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def residuals(handle: gradq.HookState) -> dict[str, Tensor]:
    local = handle.sync.feedback.local
    return {name: local.current(name).clone() for name in local.names()}


def walk(rank: int, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """For each kind: exact against dense FSDP, then int4 with feedback and a NaN in the last step."""
    outcomes: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        how, order, where, train, head = KINDS[kind]
        dense, exact, coarse = (shard(Net(how, order, head), where) for _ in range(3))
        handle = gradq.compress(exact, "fp32")
        pairs = []
        for step in range(STEPS):
            for model in (dense, exact):
                model.zero_grad(set_to_none=True)
                train(model, rank, step)
            pairs.append((gradients(dense), gradients(exact)))
        steps = handle.stats().steps
        handle.close()

        handle = gradq.compress(coarse, "int4", feedback=True)
        dense.zero_grad(set_to_none=True)  # both sum over the steps from here
        for step in range(5):
            for model in (dense, coarse):
                train(model, rank, 20 + step)
        sums = (gradients(dense), gradients(coarse))
        before = residuals(handle)
        block = coarse.blocks[order[0] if "blocks" in where else 1]
        block.poison = rank == 1
        coarse.zero_grad(set_to_none=True)
        train(coarse, rank, 99)
        block.poison = False
        after = residuals(handle)
        poisoned = [not bool(torch.isfinite(g).all()) for g in gradients(coarse).values()]
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        outcomes[kind] = {
            "pairs": pairs,
            "steps": (steps, handle.stats().steps),
            "sums": sums,
            "changed": changed,
            "kept": sorted(before),
            "poisoned": any(poisoned),
        }
        handle.close()
    return outcomes


@pytest.mark.parametrize("half", [0, 1])
def test_a_step_is_one_outermost_backward(half: int) -> None:
    """Exact specs give dense FSDP's shards; what int4 loses comes later; NaN changes no residual."""
    kinds = list(KINDS)[half::2]
    results = run_ranks(walk, 2, kinds)
    for kind in kinds:
        counts = {result[kind]["steps"] for result in results}
        assert counts == {(STEPS, 6)}, (kind, counts)
        assert any(result[kind]["poisoned"] for result in results), kind
        for result in results:
            outcome = result[kind]
            assert outcome["kept"], kind
            assert not outcome["changed"], (kind, outcome["changed"])
            for dense, ours in outcome["pairs"]:
                assert dense, kind
                assert dense.keys() == ours.keys(), kind
                for name, want in dense.items():
                    assert torch.equal(ours[name], want), (kind, name)
            dense, ours = outcome["sums"]
            for name, want in dense.items():  # without feedback the error is more than twice as large
                error = float((ours[name] - want).norm()) / float(want.norm() + 1e-12)
                assert error < 0.1, (kind, name, error)


# --- several models, and backwards that fail ------------------------------------------------------------


def several(rank: int) -> dict[str, Any]:
    """Two models in one backward, with a handle each; then two that share a block."""
    found: dict[str, Any] = {}
    pairs = [(shard(Net(), "blocks"), shard(Net(head=True), "blocks, root")) for _ in range(2)]
    handles = [gradq.compress(model, "fp32") for model in pairs[1]]
    for step in range(2):
        for one, other in pairs:
            one.zero_grad(), other.zero_grad()
            (loss_of(one, rank, step) * loss_of(other, rank, 9 + step)).backward()
    loss_of(pairs[1][0], rank, 5).backward()  # of one of them alone
    loss_of(pairs[0][0], rank, 5).backward()
    found["steps"] = [handle.stats().steps for handle in handles]
    found["pairs"] = [(gradients(dense), gradients(ours)) for dense, ours in zip(*pairs, strict=True)]
    for handle in handles:
        handle.close()

    one, other = shard(Net(), "blocks"), Net()
    other.blocks[0] = one.blocks[1]
    shard(other, "12")
    first = gradq.compress(one, "fp32")
    try:
        gradq.compress(other, "fp32")
    except gradq.UnsupportedError as error:
        found["shared"] = str(error)
    first.close()
    both = gradq.compress(nn.ModuleList([one, other]), "fp32")
    (loss_of(one, rank, 1) + loss_of(other, rank, 2)).backward()
    loss_of(other, rank, 3).backward()
    found["both"] = both.stats().steps
    both.close()
    return found


def test_several_models_count_their_own_steps() -> None:
    for found in run_ranks(several, 2):
        assert found["steps"] == [3, 2]
        for dense, ours in found["pairs"]:
            assert dense
            assert all(torch.equal(ours[name], want) for name, want in dense.items())
        for word in ("another gradq handle", "nn.ModuleList"):
            assert word in found["shared"]
        assert found["both"] == 2


class Fail(torch.autograd.Function):
    """Identity forward; backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("on purpose")


class Failing(nn.Module):
    """A model whose backward raises in front of the layer it wraps, if asked."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.fails = layer, False

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(Fail.apply(x) if self.fails else x)


def failing(rank: int, how: str, where: str) -> tuple[int, list[bool], bool]:
    """A backward raises after the last block was reduced; the next ones are right again."""
    model = Net(how)
    model.blocks[1] = Failing(model.blocks[1])
    shard(model, where)
    handle = gradq.compress(model, "int4", feedback=True)
    for step in range(2):
        loss_of(model, rank, step).backward()
    before = residuals(handle)
    model.blocks[1].fails = True
    try:
        loss_of(model, rank, 7).backward()
    except ArithmeticError:
        model.blocks[1].fails = False
    for part in model.blocks:  # what FSDP asks for after an error; each block is a root here
        if "root" not in where:
            part.reset_iter_state()
    if "root" in where:
        model.reset_iter_state()
    between = residuals(handle)
    loss_of(model, rank, 8).backward()
    steps = handle.stats().steps
    unchanged = [torch.equal(before[name], between[name]) for name in before]
    finite = all(bool(torch.isfinite(g).all()) for g in gradients(model).values())
    handle.close()
    return steps, unchanged, finite


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp.FSDPModule, "reset_iter_state"), reason="this torch cannot recover"
)
@pytest.mark.parametrize(("how", "where"), [("", "blocks, root"), ("reentrant", "blocks")])
def test_a_backward_that_raises_is_no_step(how: str, where: str) -> None:
    for steps, unchanged, finite in run_ranks(failing, 2, how, where):
        assert steps == 3
        assert unchanged
        assert all(unchanged)
        assert finite
