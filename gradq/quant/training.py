"""Quantization-aware training: groups of parameters, and the steps at which ranges and statistics freeze."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradq.errors import ConfigError
from gradq.quant.batches import unwrap
from gradq.quant.fake import FakeQuantize
from gradq.quant.modules import _QuantConv

__all__ = ["RangeSchedule", "param_groups"]


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; only weights have weight decay, biases, norms and scales have none.

    Weight decay on ``log2_scale`` would pull every scale towards 1.

    Args:
        model: model from `prepare`, possibly inside DDP.
        lr: learning rate; with folded batch norm and Adam 1e-4 works, and 2e-3 destroys the model.
        weight_decay: weight decay of the weights with two or more dimensions.
        scale_lr: learning rate of the scales; `lr` if None.

    Returns:
        Three groups: first the weights, then biases and norms, then the scales.
    """
    if lr <= 0:
        raise ConfigError(f"lr is {lr}; legal: greater than 0")
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "others": [], "scales": []}
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad:
            kind = "scales" if name.endswith("log2_scale") else "weights" if parameter.ndim > 1 else "others"
            groups[kind].append(parameter)
    return [
        {"params": groups["weights"], "lr": lr, "weight_decay": weight_decay},
        {"params": groups["others"], "lr": lr, "weight_decay": 0.0},
        {"params": groups["scales"], "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
    ]


class RangeSchedule:
    """Freezes ranges and batch-norm statistics at given steps; call `step` after each ``optimizer.step()``.

    Scales are held for the first steps (weights settle), then learned, then frozen for the rest, as the
    published recipes do (Jacob et al. 2018 §3.1; Jain et al. 2020 §5.2). A held scale still receives
    gradients, so DDP sees no unused parameter; its value is put back after the optimizer's step.

    Args:
        model: model from `prepare`, possibly inside DDP.
        learn_from: number of the first step whose update of the scales is kept.
        freeze_at: number of the step from which the scales are frozen; they never are if None.
        freeze_batch_norm_at: number of the step from which live batch norm keeps its statistics; it always
            updates them if None.

    Raises:
        ConfigError: a negative step, or scales that freeze before they learn.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learn_from: int = 0,
        freeze_at: int | None = None,
        freeze_batch_norm_at: int | None = None,
    ) -> None:
        if learn_from < 0 or (freeze_at is not None and freeze_at < learn_from):
            raise ConfigError(
                f"learn_from is {learn_from} and freeze_at {freeze_at}; legal: 0 ≤ learn_from ≤ freeze_at"
            )
        self.model = unwrap(model)
        self.learn_from, self.freeze_at = learn_from, freeze_at
        self.freeze_batch_norm_at = freeze_batch_norm_at
        self.num_steps = 0
        self._held: dict[str, Tensor] = {}
        self._apply()

    @property
    def is_frozen(self) -> bool:
        """True if the next step's update of the scales will be undone."""
        past = self.freeze_at is not None and self.num_steps >= self.freeze_at
        return self.num_steps < self.learn_from or past

    @torch.no_grad()
    def step(self) -> None:
        """Count a step and put the held scales back; call it after ``optimizer.step()``."""
        if self.is_frozen:
            for name, parameter in self._scales():
                parameter.copy_(self._held[name])
        self.num_steps += 1
        self._apply()

    def _scales(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, m.log2_scale)
            for name, m in self.model.named_modules()
            if isinstance(m, FakeQuantize) and m.log2_scale is not None
        ]

    def _apply(self) -> None:
        if self.is_frozen:
            if not self._held:
                self._held = {name: p.detach().clone() for name, p in self._scales()}
        else:
            self._held = {}
        if self.freeze_batch_norm_at is not None and self.num_steps >= self.freeze_batch_norm_at:
            for module in self.model.modules():
                if isinstance(module, _QuantConv):
                    module.freeze_batch_norm()

    def state_dict(self) -> dict[str, Any]:
        """The step and the held scales."""
        return {"num_steps": self.num_steps, "held": dict(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        Args:
            state: number of steps and held scales.
        """
        self.num_steps, self._held = int(state["num_steps"]), dict(state["held"])
        self._apply()
