"""The graph computes what the user's model computes: checked on the example inputs after each rewrite."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from gradq.errors import NonFiniteError, TraceError, UnsupportedError
from gradq.quant.batches import evaluating, float_mode, watching
from gradq.quant.folding import FoldRecord
from gradq.quant.info import copy_model

__all__ = ["Expected", "check_values", "difference"]

_TOLERANCE = 1e-3  # of the largest magnitude of an output: rounding of fp32 in deep networks stays below


def difference(expected: Any, got: Any) -> str | None:
    """How two outputs differ beyond the rounding of fp32; None if they do not.

    Args:
        expected: tensors in any container.
        got: the same containers.
    """
    before, after = _leaves(expected), _leaves(got)
    if len(before) != len(after):
        return f"it has {len(after)} outputs, the model has {len(before)}"
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b) or (isinstance(a, (int, float, str, bool)) and a != b):
                return f"output {i} is {b!r}, the model's is {a!r}"
            continue
        a, b = a.detach().cpu(), b.detach().cpu()
        if a.shape != b.shape or a.dtype != b.dtype:
            return (
                f"output {i} is {b.dtype} of shape {list(b.shape)}, the model's is {a.dtype} of shape "
                f"{list(a.shape)}"
            )
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return f"output {i} holds NaN or Inf in other places than the model's"
        error, largest = (a - b)[finite].abs(), a[finite].abs()
        tolerance = _TOLERANCE if expected is not None and a.dtype.is_floating_point else 0.0
        if error.numel() and float(error.max()) > tolerance * float(largest.max()) + 1e-7:
            worst, most = float(error.max()), float(largest.max())
            return f"output {i} differs from the model's by up to {worst:.3g} of {most:.3g}"
    return None


def _leaves(value: Any, depth: int = 4) -> list[Any]:
    """What a container holds; of an object that torch knows no structure of, its attributes."""
    leaves: list[Any] = []
    for leaf in torch.utils._pytree.tree_leaves(value):
        held = getattr(leaf, "__dict__", None)
        plain = isinstance(leaf, (Tensor, nn.Module, type)) or callable(leaf) or not isinstance(held, dict)
        leaves += [leaf] if plain or not held or depth == 0 else _leaves(dict(held), depth - 1)
    return leaves


def _make_known(value: Any) -> None:
    """Tell torch of the dataclasses in a container: they can then be traced, rebuilt and exported."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, nn.Module)):
            torch.export.register_dataclass(type(leaf))
            _make_known([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def check_values(model: nn.Module) -> None:
    """Every parameter has finite values.

    Raises:
        UnsupportedError: a parameter on the meta device, or of a lazy module that has seen no input; named.
        NonFiniteError: NaN or Inf in a parameter; named.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UnsupportedError(
                f"parameter {name} belongs to a lazy module that has seen no input: run the model once on an "
                "example before quantizing"
            )
        if parameter.is_meta:
            raise UnsupportedError(
                f"parameter {name} is on the meta device and has no values: call "
                "model.to_empty(device='cpu') and load the checkpoint before quantizing"
            )
        if parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            raise NonFiniteError(
                f"parameter {name} holds NaN or Inf; repair or reload the checkpoint before quantizing"
            )


class Expected:
    """What the user's model computes on its example inputs.

    Args:
        model: untouched; run once, in evaluation, without gradients.
        args: positional example arguments.
        kwargs: keyword example arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared = {id(p): p for p in model.parameters()}
        self.model = copy_model(model, memo=shared)  # a forward may change buffers and attributes
        self.args, self.kwargs = args, kwargs
        self.name = type(model).__name__
        before = {n: b.clone() for n, b in self.model.named_buffers()}
        _make_known((args, kwargs))
        self.outputs = self._run(self.model)
        _make_known(self.outputs)
        changed = [n for n, b in self.model.named_buffers() if n in before and not torch.equal(b, before[n])]
        again = difference(self.outputs, self._run(self.model))
        if changed or again is not None:
            what = (
                f"changes the buffer {changed[0]} in place"
                if changed
                else f"keeps state: {again} in a second call"
            )
            raise TraceError(
                f"{self.name}.forward {what}. A graph cannot do that: make the outputs depend on the inputs "
                "only, or quantize without tracing: quant.swap(model)"
            )

    def _run(self, model: nn.Module) -> Any:
        """Outputs in evaluation; drawn numbers are the same each time."""
        args, kwargs = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone(), (self.args, self.kwargs)
        )
        with torch.random.fork_rng(devices=[]), evaluating(model), float_mode(model, "copy"):
            torch.manual_seed(0)
            return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), model(*args, **kwargs))

    def check(self, traced: fx.GraphModule, after: str, folded: list[FoldRecord] = []) -> None:  # noqa: B006
        """Compare.

        Args:
            traced: the graph, in any mode.
            after: what was done to it last.
            folded: batch norms that stand in the layer before them.

        Raises:
            TraceError: the outputs differ; the message names the first layer whose output does.
        """
        found = difference(self.outputs, self._run(traced))
        if found is None:
            return
        where = self._first(traced, folded)
        at = f"; the first layer that differs is {where}" if where else ""
        raise TraceError(
            f"after {after} the graph of {self.name} does not compute what the model does: {found}{at}. "
            "Leave that part in float with Config(skip=(name,)), which is always right; if its "
            "forward depends on "
            "state that tracing does not see, make it depend on its inputs only; and please report it."
        )

    def _first(self, traced: fx.GraphModule, folded: list[FoldRecord]) -> str | None:
        """Name of the first layer, in the graph's order, whose output is not the model's."""
        ends = {record.layer: record.batch_norm for record in folded}
        mine: dict[str, list[Any]] = {}
        theirs: dict[str, list[Any]] = {}

        def watch(model: nn.Module, names: list[str], into: dict[str, list[Any]]) -> list[Any]:
            modules = dict(model.named_modules(remove_duplicate=False))
            return [
                modules[n].register_forward_hook(
                    lambda _m, _i, out, n=n: into.setdefault(n, []).append(
                        torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), out)
                    )
                )
                for n in dict.fromkeys(names) if n in modules
            ]  # fmt: skip

        calls = [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]
        hooks = watch(traced, calls, mine) + watch(self.model, [ends.get(n, n) for n in calls], theirs)
        with watching(hooks):
            self._run(traced)
            self._run(self.model)
        for name in dict.fromkeys(calls):
            other = theirs.get(ends.get(name, name))
            if name in mine and other is not None and difference(other, mine[name]) is not None:
                return name
        return None
