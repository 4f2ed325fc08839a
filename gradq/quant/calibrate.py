"""Calibration: batches run through the model, observers choose ranges, and the ranks agree on them.

Under ``torch.distributed`` every rank calls `calibrate` with its own share of the data, *before* wrapping in
DDP; statistics are merged, so all ranks get the same scales and zero points, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradq.errors import CalibrationError, MismatchError
from gradq.quant.batches import ToInputs, evaluating, limited, progress, run_batch, unwrap
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.modules import QuantLayer
from gradq.quant.readers import widen_scales

__all__ = ["calibrate", "quantizers", "weights"]


def quantizers(model: nn.Module) -> dict[str, ActQuant]:
    """Qualified name → activation quantizer, for every one of a model."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, ActQuant)}


def weights(model: nn.Module) -> dict[str, tuple[torch.Tensor, WeightQuant]]:
    """Qualified name → weight and its quantizer, for every quantized weight; tied weights appear once."""
    found: dict[str, tuple[torch.Tensor, WeightQuant]] = {}
    seen: set[int] = set()
    for name, module in unwrap(model).named_modules():
        if isinstance(module, QuantLayer):
            for key, weight, quantizer in module.quantized_weights():
                if id(quantizer) not in seen:
                    seen.add(id(quantizer))
                    found[f"{name}.{key}" if name else key] = (weight, quantizer)
    return found


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    to_inputs: ToInputs | None = None,
    refit_weights: bool = True,
    show_progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Choose the ranges of activations (and weights) from data, in place.

    Args:
        model: model from `prepare`, or one with quantized layers placed by hand.
        loader: iterable of batches; `gradq.quant.batches.run_batch` says what a batch may be.
        num_batches: largest number of batches to run; all of them if None.
        to_inputs: function from a batch to the model's arguments, if the default does not fit.
        refit_weights: whether the scales of the weights are fitted again; False keeps learned ones.
        show_progress: whether a progress bar is shown on stderr.
        group: ranks that calibrate together; all ranks if None.

    Returns:
        The model, which quantizes from now on.

    Raises:
        CalibrationError: a loader without batches; a quantizer that no batch reached, or a rank that failed
            (named).
        NonFiniteError: NaN or Inf in an activation; named. The model is then unchanged.
        MismatchError: ranks with different quantizers.
    """
    model = unwrap(model)
    acts = quantizers(model)
    if not acts and not weights(model):
        raise CalibrationError(
            f"{type(model).__name__} has no quantizers; call quant.prepare first, or place quantized layers "
            "by hand"
        )
    if refit_weights:
        for weight, weight_quant in weights(model).values():
            weight_quant.fit(weight)
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
    failure: Exception | None = None
    batches = 0
    for quantizer in acts.values():
        quantizer.start_observing()
    try:
        with evaluating(model):
            items, total = limited(loader, num_batches)
            for batch in progress(items, "calibrating", total=total, show=show_progress):
                run_batch(model, batch, to_inputs)
                batches += 1
    except Exception as error:
        failure = error
    try:
        if together:
            _agree(acts, failure, group)
        if failure is not None:
            raise failure
        if batches == 0 and not together and any(not q.format.is_dynamic for q in acts.values()):
            raise CalibrationError("the loader yielded no batch; give at least one")
        for quantizer in acts.values():
            quantizer.stop_observing()
    finally:
        for quantizer in acts.values():
            quantizer.observer, quantizer.mode = None, "quantize"
    return widen_scales(model)


def _agree(acts: dict[str, ActQuant], failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Merge the statistics of all ranks; if one rank failed, every rank raises an error."""
    device = next((q.zero_point.device for q in acts.values()), torch.device("cpu"))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    state = torch.zeros(world, 2, dtype=torch.int64, device=device)
    state[rank, 0] = 0 if failure is None else 1
    state[rank, 1] = len(acts)
    dist.all_reduce(state, group=group)
    failed = state[:, 0].nonzero().flatten().tolist()
    if failed and failure is None:
        raise CalibrationError(f"calibration failed on rank {failed[0]}; its own error says why")
    counts = state[:, 1].tolist()
    if len(set(counts)) > 1:
        raise MismatchError(f"ranks have different numbers of activation quantizers: {counts}")
    if not failed:
        for name in sorted(acts):
            observer = acts[name].observer
            if observer is not None:
                observer.merge(group)
