"""Steps of the inner optimizer, counted alike on all ranks whatever wraps it.

torch's own hook counts the steps of a plain optimizer. A class that is an optimizer but hands everything to
another one (as Accelerate's) may lack that hook; then calls of its `step` are counted. A GradScaler skips
steps on single ranks, after which ranks would average at different iterations. So the calls of its own `step`
are counted, skipped or not, where it was given; where it was not, the first step that it makes is an error.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradq.errors import ConfigError, UnsupportedError

__all__ = ["StepCounter", "check", "stateful"]


def check(optimizer: object, scaler: object, parameters: Iterable[Tensor]) -> None:
    """Check that the steps of an optimizer can be counted; None stands for a loop that counts by itself.

    Raises:
        UnsupportedError, ConfigError: naming what to do.
    """
    if scaler is not None and not (hasattr(scaler, "step") and hasattr(scaler, "update")):
        raise ConfigError(f"grad_scaler is a {type(scaler).__name__}; pass the torch.amp.GradScaler in use")
    if optimizer is None:
        if scaler is not None:
            raise ConfigError("grad_scaler= counts steps of inner_optimizer=, which is None; leave it out")
        return
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedError(
            f"inner_optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer that the "
            "training loop steps (of several, the one that it steps last), or None and call step() after "
            "every step"
        )
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("torch.distributed.optim"):
            raise UnsupportedError(
                f"inner_optimizer is a {kind.__name__}, which exchanges parameters between ranks in its own "
                "steps; local steps need an optimizer that stays on its rank, such as torch.optim.AdamW"
            )
    mine = {id(parameter) for parameter in parameters}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "inner_optimizer holds none of the model's parameters; pass the optimizer that steps this model, "
            "or None and call step() after every step"
        )


def stateful(optimizer: Optimizer) -> Optimizer:
    """The optimizer that holds the state: itself, or the one it hands everything to."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):  # Optimizer.__init__ was not called
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer


def _untraced(function: Callable[..., None]) -> Callable[..., None]:
    """The function, made so that torch.compile calls it and does not compile it."""
    disable: Callable[[Callable[..., None]], Callable[..., None]] = torch.compiler.disable
    return disable(function)


class StepCounter:
    """Calls counted once for every step of an optimizer.

    Args:
        optimizer: the optimizer, which `check` has checked.
        scaler: the GradScaler that steps it, if any.
        counted: a function that is called after each step, and after each that the scaler skipped.
    """

    def __init__(self, optimizer: Optimizer, scaler: Any, counted: Callable[[], None]) -> None:
        self._optimizer, self._has_scaler, self._depth = optimizer, scaler is not None, 0
        self._counted = counted
        self._undo: list[Callable[[], None]] = []
        if hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._undo.append(optimizer.register_step_post_hook(_untraced(self._hook)).remove)
        else:
            self._wrap(optimizer, self._counts)
        if scaler is not None:
            self._wrap(scaler, self._is_ours)

    def close(self) -> None:
        """Stop counting."""
        self._counted = lambda: None
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _hook(self, *unused: Any) -> None:
        """Count the end of a step, unless the step is part of one that `_wrap` counts."""
        if not self._depth:
            self._refuse_unknown_scaler()
            self._counted()

    def _wrap(self, owner: Any, counts: Callable[..., bool]) -> None:
        """Count the calls of owner.step for which counts(*arguments) holds."""
        before, had_own = owner.step, "step" in vars(owner)
        refuse = _untraced(self._refuse_unknown_scaler)
        count = _untraced(lambda: self._counted())

        @functools.wraps(before)
        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            is_counted = not self._depth and counts(*args, **kwargs)
            if is_counted and owner is self._optimizer:
                refuse()
            self._depth += is_counted
            try:
                result = before(*args, **kwargs)
            finally:
                self._depth -= is_counted
            if is_counted:
                count()
            return result

        wrapper = types.MethodType(step, owner)  # LR schedulers wrap bound methods only
        owner.step = wrapper

        def undo() -> None:
            if vars(owner).get("step") is wrapper:  # nobody has wrapped it since
                if had_own:
                    owner.step = before
                else:
                    del owner.step

        self._undo.append(undo)

    def _counts(self, *unused: Any, **unused_too: Any) -> bool:
        """Whether a call is a step: Accelerate's optimizer does nothing while gradients are accumulated."""
        return bool(getattr(getattr(self._optimizer, "gradient_state", None), "sync_gradients", True))

    def _is_ours(self, optimizer: Any, *unused: Any, **unused_too: Any) -> bool:
        return optimizer is self._optimizer or optimizer is stateful(self._optimizer)

    def _refuse_unknown_scaler(self) -> None:
        """Look for a GradScaler among the callers.

        Raises:
            UnsupportedError: there is one that was not given.
        """
        if self._has_scaler:
            return
        code, frame = torch.amp.GradScaler.step.__code__, sys._getframe(1)
        while (above := frame.f_back) is not None:
            if above.f_code is code:
                raise UnsupportedError(
                    "a GradScaler steps the inner optimizer. It skips steps on single ranks, which "
                    "then average at other iterations: pass grad_scaler=, or inner_optimizer=None and call "
                    "step() after every iteration"
                )
            frame = above
