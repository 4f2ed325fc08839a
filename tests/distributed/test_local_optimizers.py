"""Local steps with optimizers that frameworks wrap: averages every so many steps, or a clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradq
from gradq.testing import run_ranks

EVERY, STEPS = 4, 8


class Delegating(torch.optim.Optimizer):
    """An optimizer in type only, as Accelerate's: `Optimizer.__init__` is not called."""

    def __init__(self, inner: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        self.optimizer, self.scaler = inner, scaler
        self.gradient_state = type("State", (), {"sync_gradients": True})()

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value):
        self.optimizer.param_groups = value

    @property
    def state(self):
        return self.optimizer.state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def step(self, closure=None):
        if not self.gradient_state.sync_gradients:
            return
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


class Lookahead(torch.optim.Optimizer):
    """Two steps of the inner one a step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()
        self.inner.step()


def make(kind: str, model: nn.Module) -> tuple[Any, Any, Any]:
    """The optimizer that the loop steps, a GradScaler, and what DiLoCo gets of them."""
    inner: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = {
        "delegating": lambda: Delegating(inner),
        "delegating accumulates": lambda: Delegating(inner),
        "delegating with a scaler inside": lambda: Delegating(inner, scaler),
        "delegating, scaler": lambda: Delegating(inner),
        "delegating, scheduler": lambda: Delegating(inner),
        "lookahead": lambda: Lookahead(inner),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=3),
        "two": lambda: torch.optim.SGD([model[0].weight], lr=0.1),
    }.get(kind, lambda: inner)()
    given: dict[str, Any] = {"inner_optimizer": optimizer}
    if "scaler" in kind and "unknown" not in kind and "inside" not in kind:
        given["grad_scaler"] = scaler
    if kind == "of the inner one":
        optimizer = Delegating(inner)
    return optimizer, scaler if "scaler" in kind and "inside" not in kind else None, given


def train(rank: int, kinds: list[str]) -> dict[str, tuple[int, bool, int]]:
    """Inner steps counted, whether anything moved, and a digest of the parameters at the end."""
    outcomes: dict[str, Any] = {}
    for kind in kinds:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
        optimizer, scaler, given = make(kind, model)
        if kind == "scheduler before":
            torch.optim.lr_scheduler.StepLR(optimizer, 5)
        try:
            local = gradq.DiLoCo(model, given.pop("inner_optimizer"), "int4", every=EVERY, **given)
            if "scheduler" in kind:
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            other = torch.optim.SGD([model[2].weight], lr=0.1) if kind == "two" else None
            step_function = optimizer.step
            if kind == "compiled":
                step_function = torch.compile(optimizer.step, backend="eager")
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(100 * step + rank)
                x = torch.randn(8, 40, generator=generator)

                def closure(x=x, optimizer=optimizer, model=model):
                    optimizer.zero_grad()
                    loss = model(x).square().mean()
                    loss.backward()
                    return loss

                if kind == "delegating accumulates":
                    for micro in range(2):
                        optimizer.gradient_state.sync_gradients = micro == 1
                        closure()
                        optimizer.step()
                elif kind == "lbfgs":
                    optimizer.step(closure)
                elif scaler is not None or "inside" in kind:
                    optimizer.zero_grad()
                    used = scaler or optimizer.scaler
                    bad = float("inf") if rank == 1 and step == 2 else 1.0
                    used.scale(model(x).square().mean() * bad).backward()
                    if scaler is None:
                        optimizer.step()
                    else:
                        scaler.step(optimizer)
                        scaler.update()
                else:
                    closure()
                    if other is not None:
                        other.step()
                    step_function()
                if "scheduler" in kind:
                    scheduler.step()
            outcomes[kind] = local.inner_step, [p.detach().clone() for p in model.parameters()]
            local.close()
            optimizer.step(closure) if kind == "lbfgs" else optimizer.step()
            assert local.inner_step == outcomes[kind][0], "it counts after close()"
        except gradq.GradqError as error:
            outcomes[kind] = f"{type(error).__name__}: {error}"
            local.close()
    return outcomes


KINDS = [
    "plain",
    "scheduler before",
    "scheduler after",
    "delegating",
    "delegating accumulates",
    "delegating with a scaler inside",
    "delegating, scaler",
    "delegating, scheduler",
    "of the inner one",
    "lookahead",
    "lbfgs",
    "two",
    "scaler",
    "unknown scaler",
]


def test_steps_are_counted_whatever_wraps_the_optimizer() -> None:
    """Replicas are equal after two averages, also where a GradScaler skips a step on one rank."""
    first, second = run_ranks(train, 2, KINDS)
    for kind in KINDS:
        if kind == "unknown scaler":
            for outcome in (first[kind], second[kind]):
                assert outcome.startswith("UnsupportedError")
                assert "grad_scaler=" in outcome
                assert "inner_optimizer=None" in outcome
            continue
        assert first[kind][0] == second[kind][0] == STEPS, (kind, first[kind])
        for mine, theirs in zip(first[kind][1], second[kind][1], strict=True):
            assert torch.equal(mine, theirs), kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_a_compiled_step_counts() -> None:
    first, second = run_ranks(train, 2, ["compiled"])
    assert first["compiled"][0] == STEPS
    for mine, theirs in zip(first["compiled"][1], second["compiled"][1], strict=True):
        assert torch.equal(mine, theirs)


def refused(rank: int, cases: list[str]) -> dict[str, str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    messages = {}
    for case in cases:
        model = nn.Linear(40, 40)
        options: dict[str, Any] = {}
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        if case == "zero":
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        elif case == "list":
            optimizer = [optimizer]
        elif case == "another model's":
            optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1)
        elif case == "scaler alone":
            optimizer, options = None, {"grad_scaler": torch.amp.GradScaler("cpu")}
        elif case == "no scaler":
            options = {"grad_scaler": 256.0}
        elif case == "alpha":
            options = {"fragment_update_alpha": 0.5}
        elif case == "meta":
            model = nn.Linear(40, 40, device="meta")
        elif case == "lazy":
            model = nn.LazyLinear(40)
        try:
            gradq.DiLoCo(model, optimizer, every=EVERY, **options)
            messages[case] = "no error"
        except gradq.GradqError as error:
            messages[case] = f"{type(error).__name__}: {error}"
    return messages


REFUSED = {
    "zero": ["UnsupportedError", "ZeroRedundancyOptimizer", "AdamW"],
    "list": ["UnsupportedError", "list", "the one that it steps last"],
    "another model's": ["ConfigError", "none of the model's parameters"],
    "scaler alone": ["ConfigError", "grad_scaler=", "leave it out"],
    "no scaler": ["ConfigError", "float", "GradScaler"],
    "alpha": ["ConfigError", "fragment_update_alpha=0.5", "delay"],
    "meta": ["UnsupportedError", "weight", "to_empty"],
    "lazy": ["UnsupportedError", "weight", "one forward"],
}


def test_what_cannot_be_counted_is_named() -> None:
    for messages in run_ranks(refused, 2, list(REFUSED)):
        for case, words in REFUSED.items():
            for word in words:
                assert word in messages[case], messages[case]
