"""Fake quantizers: a tensor in, the tensor an integer runtime would see out, with straight-through gradients.

Shapes: R rows that own a scale, n elements a row. A weight (O, …) has R = 1, O, or O·groups; an activation R
= 1.

The scale is learned as its logarithm, ``scale = 2**log2_scale`` (Jain et al. 2020, arXiv:1903.08066): it
stays positive, and it survives the noise of compressed gradients, where a raw scale drifts. `log2_scale` has
shape (R,), never 0-dim. Zero points are calibrated and then frozen: they are integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradq.errors import CalibrationError, CheckpointError, ConfigError, NonFiniteError
from gradq.quant.codebooks import fit_codebook, fixed_table
from gradq.quant.formats import Format, parse_format
from gradq.quant.observers import Observer, affine, make_observer
from gradq.quant.ops import fake_codebook, fake_float8, fake_quantize, float8, nearest_code, quantize

__all__ = ["ActQuant", "FakeQuantize", "WeightQuant", "float8_names"]

MODES = ("quantize", "observe", "float", "copy")


class FakeQuantize(nn.Module):
    """What weights' and activations' quantizers share: the scale, its state, and the modes.

    Modes: ``quantize`` (the default), ``observe`` (feed the observer, pass the values through), ``float``
        (pass the values through), ``copy`` (pass a copy).

    Args:
        fmt: the number format.
        num_rows: R.
        name: the tensor's name, for errors.

    Attributes:
        log2_scale: (R,) fp32 parameter; absent (None) for a dynamic format.
        zero_point: (R,) int32 buffer.
        codebook: (K,) int8 buffer, or None for a uniform format.
        initialized: True once the scale has been set.
    """

    log2_scale: nn.Parameter | None
    zero_point: Tensor
    codebook: Tensor | None

    def __init__(self, fmt: Format, num_rows: int, *, name: str) -> None:
        super().__init__()
        self.format = fmt
        self.name = name
        self.num_rows = num_rows
        self.mode = "quantize"
        self.initialized = fmt.is_dynamic
        self.observer: Observer | None = None
        self.log2_scale = None if fmt.is_dynamic else nn.Parameter(torch.zeros(num_rows))
        self.register_buffer("zero_point", torch.zeros(num_rows, dtype=torch.int32))
        table = None if fmt.is_uniform or fmt.is_float8 else fixed_table(fmt.kind, fmt.bits)
        self.register_buffer("codebook", table)

    @property
    def scale(self) -> Tensor:
        """(R,) fp32 scales.

        Raises:
            CalibrationError: they have not been set.
        """
        if self.log2_scale is None:
            raise CalibrationError(
                f"{self.name} is quantized dynamically ({self.format}): it has no fixed scale"
            )
        self._require_range()
        return torch.exp2(self.log2_scale.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """As torch, but scales stay fp32 when a model moves to fp16 or bf16: their digits matter."""
        exact = None if self.log2_scale is None else self.log2_scale.detach().clone()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.log2_scale is not None and self.log2_scale.dtype != exact.dtype:
            self.log2_scale.data = exact.to(self.log2_scale.device)
        return self

    def _require_range(self) -> None:
        if not self.initialized:
            raise CalibrationError(
                f"{self.name} has no range yet; run quant.calibrate(model, loader) before using the model"
            )

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set the scales and zero points.

        Args:
            scale: (R,) positive.
            zero_point: (R,) integers.

        Raises:
            ConfigError: wrong shape, or a scale that is not positive and finite.
        """
        if self.log2_scale is None:
            raise ConfigError(
                f"{self.name} is quantized dynamically ({self.format}): its range cannot be set"
            )
        if scale.shape != (self.num_rows,) or zero_point.shape != (self.num_rows,):
            raise ConfigError(
                f"{self.name}: scale has shape {tuple(scale.shape)} and zero_point "
                f"{tuple(zero_point.shape)}; "
                f"both must be ({self.num_rows},)"
            )
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ConfigError(f"{self.name}: every scale must be positive and finite")
        self.log2_scale.copy_(torch.log2(scale.to(torch.float64)))
        self.zero_point.copy_(zero_point)
        self.initialized = True

    def _check_finite(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return  # a data-dependent branch would break the graph, or make the host wait for the device
        low, high = x.detach().aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                f"{self.name} holds NaN or Inf where it is quantized; look for the layer before it, a "
                "learning rate "
                "that is too large (1e-4 is good for folded batch norm), or a broken input batch"
            )

    def _scale_grad(self, numel: int) -> float:
        return 1.0 / math.sqrt(max(1, numel // self.num_rows) * max(1, self.format.qmax))

    def get_extra_state(self) -> dict[str, Any]:
        """The format and whether the scale is set: what the tensors alone do not say."""
        return {"format": str(self.format), "initialized": self.initialized}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a saved format.

        Raises:
            CheckpointError: a saved format of another kind or granularity.
        """
        fmt = parse_format(state["format"], "weights" if isinstance(self, WeightQuant) else "activations")
        if fmt.with_bits(self.format.bits) != self.format:
            raise CheckpointError(
                f"{self.name} was saved as {fmt} and is {self.format} here; prepare with that format"
            )
        self.format, self.initialized = fmt, bool(state["initialized"])

    def extra_repr(self) -> str:
        """The format, and the mode if it is not the usual one."""
        notes = "" if self.initialized else ", not calibrated"
        return f"{self.format}{notes}" + ("" if self.mode == "quantize" else f", mode={self.mode}")


def _observer_for(fmt: Format, observer: str) -> str:
    """How ranges are chosen. The steps of a float follow the values: nothing is gained by cutting tails."""
    return "minmax" if fmt.is_float8 else observer


def float8_names(model: nn.Module) -> list[str]:
    """Names of the tensors that a model has in e4m3."""
    return [m.name for m in model.modules() if isinstance(m, FakeQuantize) and m.format.is_float8]


class WeightQuant(FakeQuantize):
    """Quantizer of a weight.

    Args:
        fmt: a static format, or its spec.
        shape: the weight's shape; the first axis is the output channel.
        observer: how `fit` chooses the range.
        name: the weight's name, for errors.

    Raises:
        ConfigError: a dynamic format.
    """

    def __init__(
        self,
        fmt: Format | str,
        shape: torch.Size | tuple[int, ...],
        *,
        observer: str = "mse",
        name: str = "weight",
    ) -> None:
        fmt = parse_format(fmt, "weights")
        if fmt.is_dynamic:
            raise ConfigError(f"{name}: the format {fmt} is dynamic; weights are known, use a static one")
        channels = shape[0]
        per_channel = math.prod(shape[1:])
        self._groups = -(-per_channel // fmt.group_size) if fmt.granularity == "group" else 1
        rows = {"tensor": 1, "channel": channels, "group": channels * self._groups}[fmt.granularity]
        groups = self._groups
        super().__init__(fmt, rows, name=name)
        self._groups = groups
        self.observer_kind = _observer_for(fmt, observer)
        make_observer(observer, fmt)  # an unknown name is an error here, not at the first fit

    def rows(self, weight: Tensor) -> Tensor:
        """View a weight as its rows; an uneven last group is padded with zeros.

        Args:
            weight: (O, …).

        Returns:
            (R, n).
        """
        if self.format.granularity != "group":
            return weight.reshape(self.num_rows, -1)
        flat = weight.reshape(weight.shape[0], -1)
        padding = self._groups * self.format.group_size - flat.shape[1]
        if padding:
            flat = nn.functional.pad(flat, (0, padding))
        return flat.reshape(self.num_rows, self.format.group_size)

    def unrows(self, rows_Rn: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Undo `rows`.

        Args:
            rows_Rn: (R, n).
            shape: the weight's shape.
        """
        if self.format.granularity != "group":
            return rows_Rn.reshape(shape)
        return rows_Rn.reshape(shape[0], -1)[:, : math.prod(shape[1:])].reshape(shape)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Choose the scales (and the table, if it is a fitted one) for a weight.

        Raises:
            NonFiniteError: NaN or Inf in the weight; the message names it.
        """
        rows = self.rows(weight.detach())
        if rows.numel() == 0:
            self.set_range(torch.ones(self.num_rows), torch.zeros(self.num_rows, dtype=torch.int32))
            return
        if self.codebook is not None:
            self._fit_table(rows)
            return
        observer = make_observer(self.observer_kind, self.format, self.num_rows, name=self.name)
        observer.update(rows)
        scale, zero_point = observer.range()
        self.set_range(scale, zero_point)

    def _fit_table(self, rows: Tensor) -> None:
        """Alternate: scales by least squares over shrink factors, then the table by Lloyd's algorithm."""
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                f"{self.name} holds NaN or Inf; repair or reload the checkpoint before quantizing"
            )
        assert self.codebook is not None
        work = rows.to(torch.float32)
        table = fixed_table(self.format.kind, self.format.bits).to(work.device)
        scale = self._table_scale(work, table)
        if self.format.kind == "codebook":
            for _ in range(4):
                table = fit_codebook(work / scale[:, None], table)
                scale = self._table_scale(work, table)
        self.codebook.copy_(table)
        self.set_range(scale, torch.zeros(self.num_rows, dtype=torch.int32, device=scale.device))

    @staticmethod
    def _table_scale(rows_Rn: Tensor, table: Tensor) -> Tensor:
        levels = table.float()
        widest = float(levels.abs().max())
        largest = rows_Rn.abs().amax(1)
        largest = torch.where(largest > 0, largest, torch.full_like(largest, widest))
        best_cost, best = torch.full_like(largest, math.inf), largest / widest
        for shrink in torch.linspace(0.4, 2.0, 65).tolist():
            scale = (largest * shrink / widest).clamp(min=2.0**-126)
            v = rows_Rn / scale[:, None]
            cost = ((levels[nearest_code(v, levels)] - v) * scale[:, None]).square().sum(1)
            best = torch.where(cost < best_cost, scale, best)
            best_cost = torch.minimum(cost, best_cost)
        return best

    def set_bits(self, bits: int, weight: Tensor) -> None:
        """Change the width and refit.

        Args:
            bits: the new width, legal for the kind.
            weight: the weight to fit.
        """
        self.format = self.format.with_bits(bits)
        if self.codebook is not None:
            self.codebook = fixed_table(self.format.kind, bits).to(weight.device)
        self.fit(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize a weight; the result has its shape and dtype."""
        if self.mode in ("float", "copy") or weight.numel() == 0:
            return weight
        self._require_range()
        self._check_finite(weight)
        assert self.log2_scale is not None
        scale = torch.exp2(self.log2_scale.float())[:, None]
        rows, grad = self.rows(weight), self._scale_grad(weight.numel())
        if self.codebook is not None:
            out = fake_codebook(rows, scale, self.codebook, grad)
        elif self.format.is_float8:
            out = fake_float8(rows, scale)
        else:
            fmt = self.format
            out = fake_quantize(rows, scale, self.zero_point[:, None], fmt.qmin, fmt.qmax, grad)
        return self.unrows(out, weight.shape)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Tensor:
        """Integer codes: what an exporter stores (entries on the int8 grid of a table; bits of e4m3).

        Args:
            weight: (O, …) floating.

        Returns:
            int32 of the weight's shape; ``(codes − zero_point)·scale`` by rows is what `forward` returns.

        Raises:
            NonFiniteError: NaN or Inf in the weight.
            CalibrationError: no scales yet.
        """
        scale = self.scale[:, None]
        rows = self.rows(weight)
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                f"{self.name} holds NaN or Inf; repair or reload the checkpoint before quantizing"
            )
        if self.codebook is not None:
            levels = self.codebook.float()
            codes = self.codebook[nearest_code(rows.float() / scale, levels)].to(torch.int32)
        elif self.format.is_float8:
            codes = float8(rows, scale).view(torch.uint8).to(torch.int32)
        else:
            codes = quantize(rows, scale, self.zero_point[:, None], self.format.qmin, self.format.qmax)
        return self.unrows(codes, weight.shape)

    def num_bits_total(self, weight: Tensor) -> int:
        """Bits that the codes, the scales (fp32), the zero points and the table take in storage."""
        scales = self.num_rows * (32 if self.format.symmetric else 32 + 8)
        table = 0 if self.codebook is None else 8 * self.codebook.numel()
        return weight.numel() * self.format.bits + scales + table


class ActQuant(FakeQuantize):
    """Quantizer of an activation; place it by hand where fx cannot.

    Args:
        fmt: ``"int8"`` (asymmetric, per tensor, calibrated) by default; ``"int8-token"`` finds its range at
            inference.
        observer: how calibration chooses the range.
        name: the tensor's name, for errors.

    Example:
        >>> quantizer = ActQuant("int8-batch")
        >>> quantizer(torch.randn(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, fmt: Format | str = "int8", *, observer: str = "mse", name: str = "activation"
    ) -> None:
        super().__init__(parse_format(fmt, "activations"), 1, name=name)
        self.observer_kind = _observer_for(self.format, observer)
        make_observer(observer, self.format)

    def start_observing(self) -> None:
        """Forget what was observed and observe from now on; a dynamic format has nothing to observe."""
        if self.format.is_dynamic:
            self.mode = "float"
            return
        self.observer = make_observer(self.observer_kind, self.format, name=self.name)
        self.mode = "observe"

    def stop_observing(self) -> None:
        """Take the observer's range and quantize from now on.

        Raises:
            CalibrationError: nothing was observed.
        """
        self.mode = "quantize"
        if self.observer is not None:
            scale, zero_point = self.observer.range()
            self.set_range(scale, zero_point)
            self.observer = None

    def dynamic_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a dynamic format for these values.

        Args:
            x: (…, features).

        Returns:
            scale (fp32) and zero point (int32): (1,) for ``batch``, (…, 1) for ``token``.
        """
        x = x.detach()
        if self.format.range == "token":
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        else:
            low, high = x.amin().reshape(1), x.amax().reshape(1)
        return affine(low, high, self.format)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize values; the result has their shape and dtype."""
        if self.mode == "float" or x.numel() == 0:
            return x
        if self.mode == "copy":
            return x.clone()
        if self.mode == "observe":
            assert self.observer is not None
            self.observer.update(x)
            return x
        self._check_finite(x)
        fmt = self.format
        if fmt.is_dynamic:
            scale, zero_point = self.dynamic_range(x)
            dynamic: Tensor = fake_quantize(x, scale, zero_point, fmt.qmin, fmt.qmax, 1.0)
            return dynamic
        self._require_range()
        assert self.log2_scale is not None
        scale = torch.exp2(self.log2_scale.float())
        if fmt.is_float8:
            return fake_float8(x, scale)
        grad = self._scale_grad(math.prod(x.shape[1:])) if torch.is_grad_enabled() else 1.0
        out: Tensor = fake_quantize(x, scale, self.zero_point, fmt.qmin, fmt.qmax, grad)
        return out
