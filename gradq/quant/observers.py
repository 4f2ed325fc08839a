"""Observers choose the range that codes cover from the values of a tensor: one interface, five rules.

Shapes: C channels (rows with a scale each; 1 for an activation), N values in a row.

An observer sees values in `update`, agrees with the other ranks in `merge`, and chooses in `range`. Values of
one row are kept in a histogram whose half-width is a power of two, so that histograms of any two batches or
ranks nest exactly; values of several rows (weights, seen once) are kept as they are.

============  =====================================================================================
``minmax``    the smallest and largest value seen
``average``   moving average of the batches' extremes (Jacob et al. 2018, arXiv:1712.05877)
``percentile``  cuts the tails: 99.99 % of the values stay inside (McKinstry et al. 2018, arXiv:1809.04191)
``mse``       the range with the smallest squared error (Choukroun et al. 2019, arXiv:1902.06822)
``entropy``   the range with the smallest KL divergence of the histograms (Migacz, GTC 2017)
============  =====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gradq.errors import CalibrationError, ConfigError, NonFiniteError
from gradq.quant.formats import Format

__all__ = [
    "OBSERVERS",
    "AverageObserver",
    "EntropyObserver",
    "MinMaxObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "affine",
    "make_observer",
]

_BINS = 8192


def affine(low_C: Tensor, high_C: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scales and zero points whose codes cover given ranges.

    The range is widened to hold 0, which is then exactly a code: padding and ReLU stay exact.

    Args:
        low_C: (C,) smallest values.
        high_C: (C,) largest values.
        fmt: format of the codes.

    Returns:
        scale: (C,) fp32, positive (1 for a row of zeros).
        zero_point: (C,) int32, 0 if the format is symmetric.
    """
    low = low_C.to(torch.float64).clamp(max=0.0)
    high = high_C.to(torch.float64).clamp(min=0.0)
    zero_point = torch.zeros(low.shape, dtype=torch.int32, device=low.device)
    scale = (
        torch.maximum(high / fmt.qmax, low / fmt.qmin)
        if fmt.symmetric
        else (high - low) / (fmt.qmax - fmt.qmin)
    )
    # Below the smallest normal number of fp32 a scale would lose its digits, and 1/scale would overflow.
    scale = torch.where(scale > 0, scale.clamp(min=2.0**-126), torch.ones_like(scale))
    if not fmt.symmetric:
        zero_point = (fmt.qmin - low / scale).round().clamp(fmt.qmin, fmt.qmax).to(torch.int32)
    return scale.to(torch.float32), zero_point


class Observer:
    """The base class of observers; a rule is a subclass that implements `_choose`.

    Args:
        fmt: format that the range is for.
        num_channels: number of rows with a scale each, C.
        name: name of the tensor, for errors.
    """

    def __init__(self, fmt: Format, num_channels: int = 1, *, name: str = "tensor") -> None:
        self.fmt = fmt
        self.num_channels = num_channels
        self.name = name
        self.batches = 0
        self.low_C: Tensor | None = None
        self.high_C: Tensor | None = None
        self._half_width = 0.0
        self._counts: Tensor | None = None
        self._rows: list[Tensor] = []

    @property
    def needs_values(self) -> bool:
        """True if the rule needs more than the extremes."""
        return True

    def update(self, x: Tensor) -> None:
        """Take values into the statistics.

        Args:
            x: floating tensor, (C, N) if C > 1, of any shape otherwise. An empty tensor is skipped.

        Raises:
            NonFiniteError: NaN or Inf in `x`; the tensor is named.
        """
        if x.numel() == 0:
            return
        x_CN = x.detach().to(torch.float32).reshape(self.num_channels, -1)
        low_C, high_C = x_CN.aminmax(dim=1)
        if not bool((low_C.isfinite() & high_C.isfinite()).all()):
            raise NonFiniteError(
                f"{self.name} holds NaN or Inf while its range is observed; look for the layer before it "
                "that produced it, or for a broken checkpoint or input batch"
            )
        self._extremes(low_C, high_C)
        self.batches += 1
        if self.needs_values:
            if self.num_channels == 1:
                self._count(x_CN[0], float(torch.maximum(-low_C, high_C)))
            else:
                self._rows.append(x_CN.clone())

    def _extremes(self, low_C: Tensor, high_C: Tensor) -> None:
        if self.low_C is None or self.high_C is None:
            self.low_C, self.high_C = low_C, high_C
        else:
            self.low_C, self.high_C = torch.minimum(self.low_C, low_C), torch.maximum(self.high_C, high_C)

    def _count(self, x_N: Tensor, largest: float) -> None:
        wanted = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else self._half_width
        if wanted == 0.0:
            wanted = 2.0**-100
        if self._counts is None:
            self._half_width, self._counts = (
                wanted,
                torch.zeros(_BINS, dtype=torch.float64, device=x_N.device),
            )
        self._widen(wanted)
        bins = ((x_N.to(torch.float64) / self._half_width + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
        self._counts += torch.bincount(bins, minlength=_BINS)

    def _widen(self, wanted: float) -> None:
        """Double the histogram until it is `wanted` wide: neighbouring bins fall together, exactly."""
        assert self._counts is not None
        while self._half_width < wanted:
            if float(self._counts.sum()) == 0.0 or self._half_width == 2.0**-100:
                # Only zeros were seen: they lie in one bin, which is moved.
                total = self._counts.sum()
                self._counts.zero_()
                self._counts[_BINS // 2] = total
                self._half_width = wanted
                return
            half = self._counts.view(-1, 2).sum(1)
            self._counts.zero_()
            self._counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = half
            self._half_width *= 2

    def merge(self, group: dist.ProcessGroup | None = None) -> None:
        """Agree with every rank of a group: afterwards all ranks hold the statistics of all batches.

        Every rank must call it, in the same order of observers. Ranks may have seen different numbers of
        batches, none included.

        Args:
            group: ranks that agree; the default group if None.
        """
        device = self.low_C.device if self.low_C is not None else torch.device("cpu")
        C = self.num_channels
        limits = torch.full((2 * C + 1,), -math.inf, dtype=torch.float64, device=device)
        if self.low_C is not None and self.high_C is not None:
            limits[:C], limits[C : 2 * C] = -self.low_C.double(), self.high_C.double()
            limits[-1] = self._half_width
        self._merge_extremes(limits, group)
        if self.needs_values and C == 1 and self.low_C is not None:
            half_width = float(limits[-1])
            if self._counts is None:
                self._half_width = half_width
                self._counts = torch.zeros(_BINS, dtype=torch.float64, device=device)
            self._widen(half_width)
            dist.all_reduce(self._counts, group=group)

    def _merge_extremes(self, limits: Tensor, group: dist.ProcessGroup | None) -> None:
        dist.all_reduce(limits, op=dist.ReduceOp.MAX, group=group)
        C = self.num_channels
        if bool(limits[:C].isfinite().all()):
            self.low_C, self.high_C = (-limits[:C]).float(), limits[C : 2 * C].float()

    def values(self) -> tuple[Tensor, Tensor]:
        """The values that were seen.

        Returns:
            values_CN: (C, N) fp32 values, or centres of the histogram's bins.
            counts_CN: (C, N) or (1, N) fp64 number of times that each was seen.
        """
        if self.num_channels == 1 and self._counts is not None:
            edges = torch.arange(_BINS, dtype=torch.float64, device=self._counts.device)
            centres = ((edges + 0.5) / (_BINS / 2) - 1) * self._half_width
            keep = self._counts > 0
            low, high = self._seen()
            return centres[keep].clamp(float(low), float(high)).float()[None], self._counts[keep][None]
        x_CN = torch.cat(self._rows, dim=1)
        return x_CN, torch.ones((1, x_CN.shape[1]), dtype=torch.float64, device=x_CN.device)

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self.low_C is None or self.high_C is None:
            raise CalibrationError(
                f"{self.name} saw no values; run quant.calibrate(model, loader) with at least one batch "
                "that reaches it"
            )
        return self.low_C, self.high_C

    def range(self) -> tuple[Tensor, Tensor]:
        """The range to cover.

        Returns:
            scale and zero point, as `affine` gives them.

        Raises:
            CalibrationError: nothing was seen.
        """
        return affine(*self._choose(), self.fmt)

    def _choose(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class MinMaxObserver(Observer):
    """The smallest and the largest value seen: no value saturates, but outliers widen every step."""

    @property
    def needs_values(self) -> bool:
        """False: the rule needs the extremes alone."""
        return False

    def _choose(self) -> tuple[Tensor, Tensor]:
        return self._seen()


class AverageObserver(MinMaxObserver):
    """Exponential moving average of each batch's extremes.

    Args:
        fmt: format that the range is for.
        num_channels: number of rows with a scale each, C.
        name: name of the tensor, for errors.
        momentum: weight of the newest batch, in (0, 1].
    """

    def __init__(
        self, fmt: Format, num_channels: int = 1, *, name: str = "tensor", momentum: float = 0.1
    ) -> None:
        super().__init__(fmt, num_channels, name=name)
        if not 0.0 < momentum <= 1.0:
            raise ConfigError(f"AverageObserver.momentum is {momentum}; legal: greater than 0, at most 1")
        self.momentum = momentum

    def _extremes(self, low_C: Tensor, high_C: Tensor) -> None:
        if self.low_C is None or self.high_C is None:
            self.low_C, self.high_C = low_C, high_C
        else:
            self.low_C = self.low_C.lerp(low_C, self.momentum)
            self.high_C = self.high_C.lerp(high_C, self.momentum)

    def _merge_extremes(self, limits: Tensor, group: dist.ProcessGroup | None) -> None:
        seen = bool(limits[0].isfinite())
        total = torch.cat(
            [torch.where(limits.isfinite(), limits, 0.0)[:-1], limits.new_tensor([float(seen)])]
        )
        dist.all_reduce(total, group=group)
        if float(total[-1]) > 0:
            mean = (total[:-1] / total[-1]).float()
            self.low_C, self.high_C = -mean[: self.num_channels], mean[self.num_channels :]


class PercentileObserver(Observer):
    """The range that holds `percentile` % of the values and leaves out as many below as above.

    Args:
        fmt: format that the range is for.
        num_channels: number of rows with a scale each, C.
        name: name of the tensor, for errors.
        percentile: share of the values in per cent, above 50 and at most 100.
    """

    def __init__(
        self, fmt: Format, num_channels: int = 1, *, name: str = "tensor", percentile: float = 99.99
    ) -> None:
        super().__init__(fmt, num_channels, name=name)
        if not 50.0 < percentile <= 100.0:
            raise ConfigError(
                f"PercentileObserver.percentile is {percentile}; legal: greater than 50, at most 100"
            )
        self.percentile = percentile

    def _choose(self) -> tuple[Tensor, Tensor]:
        self._seen()
        values_CN, counts_CN = self.values()
        sorted_CN, order = values_CN.sort(dim=1)
        share = counts_CN.expand_as(values_CN).gather(1, order).cumsum(1)
        share = share / share[:, -1:]
        tail = (100.0 - self.percentile) / 100.0
        last = share.shape[1] - 1
        first = (share <= tail).sum(1, keepdim=True).clamp(max=last)
        final = (share < 1 - tail).sum(1, keepdim=True).clamp(max=last)
        return sorted_CN.gather(1, first)[:, 0], sorted_CN.gather(1, final)[:, 0]


class _SearchObserver(Observer):
    """The base class of rules that try narrower ranges and keep the one with the smallest cost."""

    candidates = torch.linspace(0.15, 1.0, 69, dtype=torch.float64)

    def _choose(self) -> tuple[Tensor, Tensor]:
        low_C, high_C = self._seen()
        values_CN, counts_CN = self.values()
        if self.fmt.symmetric:
            high_C = torch.maximum(-low_C, high_C)
            low_C = -high_C
        low_C, high_C = low_C.clamp(max=0.0), high_C.clamp(min=0.0)
        # The unit of errors is a power of two near the largest value: squares of tiny errors are 0 in fp32.
        largest_C = torch.maximum(-low_C, high_C).double().clamp(2.0**-126, 2.0**126)
        self._per_unit_C = torch.exp2(-torch.floor(torch.log2(largest_C)))

        def best(with_shrink: Callable[[float], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            top: tuple[Tensor, Tensor, Tensor] | None = None
            for shrink in self.candidates.tolist():
                low, high = with_shrink(shrink)
                cost = self._cost(values_CN, counts_CN, low, high)
                if top is None:
                    top = cost, low, high
                    continue
                better = cost < top[0]
                top = (
                    torch.where(better, cost, top[0]),
                    torch.where(better, low, top[1]),
                    torch.where(better, high, top[2]),
                )
            assert top is not None
            return top[1], top[2]

        low, high = best(lambda s: (low_C * s, high_C * s))
        if not self.fmt.symmetric and bool((low < 0).any() and (high > 0).any()):
            low, high = best(lambda s: (low_C * s, high))
            low, high = best(lambda s: (low, high_C * s))
        return low, high

    def _cost(self, values_CN: Tensor, counts_CN: Tensor, low_C: Tensor, high_C: Tensor) -> Tensor:
        raise NotImplementedError


class MseObserver(_SearchObserver):
    """The range whose quantization error has the smallest mean square."""

    def _cost(self, values_CN: Tensor, counts_CN: Tensor, low_C: Tensor, high_C: Tensor) -> Tensor:
        scale, zero_point = (t[:, None] for t in affine(low_C, high_C, self.fmt))
        code = (values_CN / scale).round_().add_(zero_point).clamp_(self.fmt.qmin, self.fmt.qmax)
        error = code.sub_(zero_point).mul_(scale).sub_(values_CN)
        error.mul_(self._per_unit_C[:, None].to(error.dtype))
        return (error.square_() * counts_CN).sum(1)


class EntropyObserver(_SearchObserver):
    """The range whose quantized histogram diverges least (KL) from the histogram of the values.

    The histogram has 2048 bins, and the bin of exact zeros (ReLU) counts like its neighbours: a spike there
    would ask for ever finer steps. It needs many values; a channel of a weight has too few for it.
    """

    _num_bins = 2048

    def values(self) -> tuple[Tensor, Tensor]:
        """A histogram of each row between its extremes: centres (C, 2048) and counts (C, 2048)."""
        values_CN, counts_CN = super().values()
        low_C, high_C = self._seen()
        low, width = low_C.double()[:, None], (high_C - low_C).double()[:, None].clamp(min=2.0**-126)
        index = ((values_CN.double() - low) / width * self._num_bins).long().clamp(0, self._num_bins - 1)
        counts = torch.zeros(values_CN.shape[0], self._num_bins, dtype=torch.float64, device=values_CN.device)
        counts.scatter_add_(1, index, counts_CN.expand_as(values_CN).contiguous())
        edges = torch.arange(self._num_bins, dtype=torch.float64, device=values_CN.device)
        centres = low + (edges + 0.5) / self._num_bins * width
        zero = ((0.0 - low) / width * self._num_bins).long()
        inside = (zero >= 0) & (zero < self._num_bins)
        zero = zero.clamp(0, self._num_bins - 1)
        left = counts.gather(1, torch.where(zero > 0, zero - 1, zero + 1))
        right = counts.gather(1, torch.where(zero < self._num_bins - 1, zero + 1, zero - 1))
        here = counts.gather(1, zero)
        counts.scatter_(1, zero, torch.where(inside, torch.minimum(here, torch.maximum(left, right)), here))
        return centres.float(), counts

    def _cost(self, values_CN: Tensor, counts_CN: Tensor, low_C: Tensor, high_C: Tensor) -> Tensor:
        scale, zero_point = (t[:, None] for t in affine(low_C, high_C, self.fmt))
        counts = counts_CN.expand_as(values_CN)
        raw = (values_CN / scale).round() + zero_point
        code = raw.clamp(self.fmt.qmin, self.fmt.qmax)
        inside = raw == code
        index = (code - self.fmt.qmin).long()
        levels = self.fmt.qmax - self.fmt.qmin + 1
        zeros = torch.zeros((values_CN.shape[0], levels), dtype=torch.float64, device=counts.device)
        # P has the clipped tails in the outermost bins, Q does not: that is what clipping costs.
        present = inside & (counts > 0)
        kept = zeros.scatter_add(1, index, counts * inside)
        bins = zeros.scatter_add(1, index, present.double())
        q = kept.gather(1, index) / bins.gather(1, index).clamp(min=1) * present
        tails = zeros.scatter_add(1, index, counts * ~inside)
        p = (counts + tails.gather(1, index) / bins.gather(1, index).clamp(min=1)) * present
        p, q = p / p.sum(1, keepdim=True).clamp(min=1e-300), q / q.sum(1, keepdim=True).clamp(min=1e-300)
        divergence = (p * ((p + 1e-12).log() - (q + 1e-12).log())).sum(1)
        # A tail that is clipped to a level where no value lies has probability 0 there.
        lost = (tails * (bins == 0)).sum(1) / counts.sum(1).clamp(min=1)
        divergence = divergence - lost * math.log(1e-12)
        # Even the true distribution diverges from its noisy histogram, by (bins − levels) / 2N on average
        # (Miller 1955); uncorrected, the noise of few samples would ask for ever narrower ranges.
        noise = (present.sum(1) - (bins > 0).sum(1)) / (2 * counts.sum(1).clamp(min=1))
        return divergence - noise


OBSERVERS: dict[str, type[Observer]] = {
    "average": AverageObserver,
    "entropy": EntropyObserver,
    "minmax": MinMaxObserver,
    "mse": MseObserver,
    "percentile": PercentileObserver,
}


def make_observer(kind: str, fmt: Format, num_channels: int = 1, *, name: str = "tensor") -> Observer:
    """An observer by name.

    Args:
        kind: name of the rule, one of `OBSERVERS`.
        fmt: format that the range is for.
        num_channels: number of rows with a scale each, C.
        name: name of the tensor, for errors.

    Raises:
        ConfigError: a name that is none of them.
    """
    if kind not in OBSERVERS:
        raise ConfigError(f"observer is {kind!r}; legal: {', '.join(OBSERVERS)}")
    return OBSERVERS[kind](fmt, num_channels, name=name)
