"""From a model to a graph of layers through ``torch.export``, for models that ``torch.fx`` cannot trace.

torch.export runs the model's Python with the example's shapes: branches on shapes, flags and ``None``,
constants
made in forward, containers and keyword arguments are all seen. It gives ATen operators with the parameters as
inputs. Here the parameters become attributes under their names again, and an operator that a layer of the
model
ran (linear, convolution, batch norm, embedding, dropout) becomes a call of that layer, so that everything
behind
this works on layers, as with fx. Axes of the example that the model does not fix stay free.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from gradq.errors import TraceError
from gradq.quant.config import Config
from gradq.quant.layers import BATCH_NORMS, CONVOLUTIONS, layer_kind
from gradq.quant.structures import Fixed, FixedShape, Flatten, Rebuild, Structure
from gradq.quant.tracing import QuantGraph, merge_modes

__all__ = ["trace_by_export"]

_TORCH = str(Path(torch.__file__).parent)
_LAYERS: dict[Any, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv1d": (nn.Conv1d,), "conv2d": (nn.Conv2d,), "conv3d": (nn.Conv3d,),
    "conv_transpose1d": (nn.ConvTranspose1d,), "conv_transpose2d": (nn.ConvTranspose2d,),
    "conv_transpose3d": (nn.ConvTranspose3d,),
    "embedding": (nn.Embedding,), "batch_norm": BATCH_NORMS, "dropout": (nn.Dropout,),
}  # fmt: skip
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
           "_assert_async", "_functional_assert_scalar", "_functional_assert_async")  # fmt: skip


def trace_by_export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: Config,
    *,
    functional: bool = False,
) -> QuantGraph:
    """Trace a model.

    Args:
        model: its submodules are shared with the result. In evaluation only that mode is traced, and the
            result cannot be trained.
        args: example positional arguments.
        kwargs: example keyword arguments.
        config: modules it skips are not made layers, so that they stay in float.
        functional: let torch rewrite changes in place, those of views included; it takes batch norm apart.

    Raises:
        TraceError: torch.export fails; the message names the line.
    """
    mode = model.training
    built: dict[bool, _Builder] = {}
    reason = (
        f"{type(model).__name__} was in evaluation when it was prepared; to train the quantized model call "
        "prepare(model.train(), ...)"
    )
    try:
        for training in (True, False) if mode else (False,):
            model.train(training)
            try:
                built[training] = _Builder(model, args, kwargs, config, functional)
            except TraceError as error:
                if not training:
                    raise
                reason = str(error)
    finally:
        model.train(mode)
    builder = built[False]
    if True in built:
        try:
            builder.root |= merge_modes(
                built[True].graph, builder.graph, built[True].root | builder.root, type(model)
            )
            reason = ""
        except TraceError as error:
            reason = str(error)
    traced = QuantGraph(builder.root, builder.graph, type(model).__name__)
    traced.only_evaluation = reason
    if reason:
        traced.eval()
    else:
        traced.train(mode)
    return traced


class _Builder:
    """One graph of the mode the model is in.

    Attributes:
        graph: calls of layers and ATen operators.
        root: target → module, parameter, buffer or constant.
        plain_layout: nothing is changed in place, so that how a tensor lies in memory does not matter.
            Attention lays its result out in one way in training and in another one in evaluation, and the
            graphs of both modes are to be the same: a tensor need not be made contiguous, and a view is a
            reshape.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        config: Config,
        functional: bool,
    ) -> None:
        self.model, self.config = model, config
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.attributes: dict[str, fx.Node] = {}
        with _quietly():
            self.program = _export(model, args, kwargs)
            if functional:
                self.program = self.program.run_decompositions({})
        self._inputs(args)
        self.plain_layout = not any(_is_mutable(node) for node in self.program.graph.nodes)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._copy(node, self.program.graph_module)
        self._outputs()
        self.graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output") or bool(n.meta.get("keep")) or _is_mutable(n)
        )
        self._guard_shapes()
        self.root = {
            str(n.target): self.root[str(n.target)]
            for n in self.graph.nodes if n.op in ("call_module", "get_attr")
        }  # fmt: skip
        self.graph.lint()

    # --- inputs and outputs -----------------------------------------------------------------------------

    def _inputs(self, args: tuple[Any, ...]) -> None:
        """Placeholders under the user's names; parameters, buffers and constants as attributes."""
        places = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        user: list[Any] = []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                user.append(spec.arg)
                continue
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                target = str(spec.target)
                value = _attribute(self.model, target)
            else:
                target = f"constant_{spec.target}".replace(".", "_")
                value = self.program.constants[str(spec.target)]
            self.root[target] = value
            self.env[places[spec.arg.name]] = _Attribute(target)
        positional, keyword = self.program.call_spec.in_spec.children()
        names = [*_positional_names(self.model, args), *keyword.context]
        specs = [*positional.children(), *keyword.children()]
        tops = []
        for name, spec in zip(names, specs, strict=True):
            leaves, user = user[: spec.num_leaves], user[spec.num_leaves :]
            tops.append((name, spec, leaves))
        split = len(positional.children())
        tensors_first = sorted(tops[split:], key=lambda t: not _holds_tensor(t[2]))
        tops = [*tops[:split], *tensors_first]
        last = max((i for i, t in enumerate(tops) if _holds_tensor(t[2]) or not t[1].is_leaf()), default=-1)
        made = []
        for i, (name, spec, leaves) in enumerate(tops):
            has_default = i > last and spec.is_leaf()
            default = leaves[0].value if has_default else inspect.Signature.empty
            made.append(self.graph.placeholder(name, default_value=default))
        for placeholder, (name, spec, leaves) in zip(made, tops, strict=True):
            if spec.is_leaf():
                self._input(placeholder, leaves[0], name, places)
                continue
            module = f"flatten_{name}"
            self.root[module] = Flatten(name, Structure(spec))
            flat = self.graph.call_module(module, (placeholder,))
            for i, leaf in enumerate(leaves):
                self._input(
                    self.graph.call_function(operator.getitem, (flat, i)), leaf, f"{name}_{i}", places
                )

    def _input(self, node: fx.Node, leaf: Any, name: str, places: dict[str, fx.Node]) -> None:
        if hasattr(leaf, "value"):  # no tensor
            self.root[f"fixed_{name}"] = Fixed(name, leaf.value)
            self.graph.call_module(f"fixed_{name}", (node,)).meta["keep"] = True
            return
        node.meta["val"] = places[leaf.name].meta.get("val")
        self.env[places[leaf.name]] = node

    def _outputs(self) -> None:
        last = next(n for n in self.program.graph.nodes if n.op == "output")
        leaves = []
        for spec, value in zip(self.program.graph_signature.output_specs, last.args[0], strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                raise TraceError(
                    f"{type(self.model).__name__}.forward changes "
                    f"{spec.target} in place, which a quantized graph cannot do; return the new value instead"
                )
            if spec.kind == OutputKind.USER_OUTPUT:
                leaves.append(self._value(value))
        spec = self.program.call_spec.out_spec
        if _is_plain(spec):
            self.graph.output(torch.utils._pytree.tree_unflatten(leaves, spec))
            return
        self.root["rebuild_output"] = Rebuild(Structure(spec))
        self.graph.output(self.graph.call_module("rebuild_output", tuple(leaves)))

    def _guard_shapes(self) -> None:
        """Axes that torch.export fixed are checked: another length would be computed wrong in silence."""
        behind = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        for node in list(self.graph.nodes):
            val = node.meta.get("val")
            if isinstance(val, Tensor) and (node.op == "placeholder" or node.target is operator.getitem):
                lengths = [n if isinstance(n, int) else n.node.maybe_as_int() for n in val.shape]
                fixed = {i: n for i, n in enumerate(lengths) if n is not None}
                target = f"shape_of_{node.name}"
                self.root[target] = FixedShape(node.name, val.ndim, fixed)
                with self.graph.inserting_after(behind if node.op == "placeholder" else node):
                    self.graph.call_module(target, (node,)).meta["keep"] = True
            node.meta.pop("val", None)

    # --- operators --------------------------------------------------------------------------------------

    def _value(self, value: Any) -> Any:
        """A node's arguments in the new graph."""

        def of(node: fx.Node) -> Any:
            found = self.env[node]
            if isinstance(found, _Attribute):
                if found.target not in self.attributes:
                    first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
                    place = self.graph.inserting_before(first) if first else self.graph.inserting_after()
                    with place:
                        self.attributes[found.target] = self.graph.get_attr(found.target)
                return self.attributes[found.target]
            return found

        return fx.node.map_arg(value, of)

    def _copy(self, node: fx.Node, owner: nn.Module) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        packet = getattr(node.target, "overloadpacket", None)
        short = packet.__name__ if packet is not None else name
        if short in _CHECKS:
            return
        if short == "lstm" and self._lstm_call(node):
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node, owner, name)
            return
        if node.target is operator.getitem and isinstance(self.env.get(node.args[0]), tuple):  # type: ignore[arg-type]
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        if self.plain_layout and short == "contiguous":
            self.env[node] = self.env[node.args[0]]  # type: ignore[index]
            return
        path = self._path(node)
        skipped = self._is_skipped(path)
        new = None if skipped else self._layer_call(node, short, path)
        if new is None:
            given = _with_dropout(node) if short == "scaled_dot_product_attention" else node.args
            target = node.target
            if self.plain_layout and target is torch.ops.aten.view.default:
                target = torch.ops.aten.reshape.default
            new = self.graph.create_node(
                "call_function", target, self._value(given), self._value(node.kwargs), name=node.name
            )
        if skipped:
            new.meta["gradq_skipped"] = path
        new.stack_trace = node.stack_trace
        self.env[node] = new

    def _inline(self, node: fx.Node, owner: nn.Module, name: str) -> None:
        """A region under ``torch.no_grad`` or ``torch.autocast(enabled=False)``: its operators, here."""
        body, first = None, 0
        for i, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                found = _attribute(owner, str(argument.target))
                if isinstance(found, fx.GraphModule):
                    body, first = found, i + 1
                    break
        is_autocast = "autocast" in name and bool(node.args[2])
        if body is None or is_autocast or not any(key in name for key in ("set_grad_enabled", "autocast")):
            what = "torch.autocast" if is_autocast else name
            raise TraceError(
                f"{self._where(node)} runs under {what}, which a quantized graph cannot hold: take it out of "
                "forward (around the model's call it is fine)"
            )
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        for place, value in zip(inputs, node.args[first:], strict=True):
            self.env[place] = self.env[value] if isinstance(value, fx.Node) else value
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                self._copy(inner, body)
            elif inner.op == "output":
                values = inner.args[0]
                as_tuple = values if isinstance(values, (tuple, list)) else (values,)
                self.env[node] = tuple(self.env[v] if isinstance(v, fx.Node) else v for v in as_tuple)

    @staticmethod
    def _path(node: fx.Node) -> str:
        """Qualified name of the module whose forward ran the operator."""
        stack = node.meta.get("nn_module_stack") or {}
        last = list(stack.values())[-1][0] if stack else ""
        return str(last).split("@")[0]

    def _is_skipped(self, path: str) -> bool:
        parts = path.split(".")
        return any(self.config.is_skipped(".".join(parts[: i + 1])) for i in range(len(parts)))

    def _where(self, node: fx.Node) -> str:
        return f"{self._path(node) or type(self.model).__name__} ({node.name})"

    def _layer_call(self, node: fx.Node, short: str, path: str) -> fx.Node | None:
        """A call of the layer that ran the operator, if it is one of torch's."""
        if short not in _LAYERS or not path:
            return None
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return None
        if not isinstance(module, _LAYERS[short]):
            return None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and layer_kind(module) is None:
            return None
        at = 1 if short == "embedding" else 0
        weight = None if short in ("dropout", "batch_norm") else node.args[1 - at]
        if weight is not None:
            found = self.env.get(weight)  # type: ignore[arg-type]
            held = self.root.get(found.target) if isinstance(found, _Attribute) else None
            if held is not module.weight:
                return None
        self.root[path] = module
        return self.graph.create_node(
            "call_module", path, (self._value(node.args[at]),), name=path.replace(".", "_")
        )

    def _lstm_call(self, node: fx.Node) -> bool:
        """Call the `nn.LSTM` that ran the operator; False if none did."""
        path = self._path(node)
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return False
        if not path or type(module) is not nn.LSTM or self._is_skipped(path) or len(node.args) != 9:
            return False
        x, states, parameters = node.args[:3]
        if not isinstance(states, (list, tuple)) or not isinstance(parameters, (list, tuple)):
            return False  # packed
        found = [self.env.get(p) for p in parameters if isinstance(p, fx.Node)]
        held = [self.root.get(f.target) if isinstance(f, _Attribute) else None for f in found]
        own = [getattr(module, key) for key in module._flat_weights_names]
        if len(held) != len(own) or any(a is not b for a, b in zip(held, own, strict=True)):
            return False
        zeros = all(isinstance(s, fx.Node) and "aten.zeros" in str(s.target) for s in states)
        self.root[path] = module
        arguments = (self._value(x),) if zeros else (self._value(x), tuple(self._value(s) for s in states))
        out = self.graph.create_node("call_module", path, arguments, name=path.replace(".", "_"))
        out.stack_trace = node.stack_trace
        y, last = (self.graph.call_function(operator.getitem, (out, i)) for i in range(2))
        h, c = (self.graph.call_function(operator.getitem, (last, i)) for i in range(2))
        self.env[node] = (y, h, c)
        return True


def _with_dropout(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of attention with its mask and dropout written out: both modes have the same."""
    return (*node.args, *(None, 0.0)[len(node.args) - 3 :]) if 3 <= len(node.args) < 5 else node.args


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


class _Attribute:
    """A parameter, buffer or constant that stands for a placeholder."""

    def __init__(self, target: str) -> None:
        self.target = target


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _holds_tensor(leaves: list[Any]) -> bool:
    return any(not hasattr(leaf, "value") for leaf in leaves)


def _is_plain(spec: Any) -> bool:
    """True for a structure of tuples, lists and dicts alone."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(_is_plain(child) for child in spec.children())


def _positional_names(model: nn.Module, args: tuple[Any, ...]) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[: len(args)]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An exported program with every axis free that the model leaves free."""
    free = torch.export.Dim.AUTO
    problems: list[Exception] = []
    two = torch.utils._pytree.tree_map_only(Tensor, _twice, (args, kwargs))
    alone = all(t.shape[0] == 1 for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _has_batch(t))
    for inputs, are_free in (
        *(((two, True),) if alone else ()),
        ((args, kwargs), True),
        ((args, kwargs), False),
    ):
        shapes = None
        if are_free:
            bound = inspect.signature(model.forward).bind(*inputs[0], **inputs[1]).arguments
            shapes = torch.utils._pytree.tree_map(
                lambda t: dict.fromkeys(range(t.ndim), free) if isinstance(t, Tensor) else None, dict(bound)
            )
        try:
            return torch.export.export(model, inputs[0], inputs[1], dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever the user's forward raises on stand-ins for its tensors
            problems.append(error)
    last = problems[-1]
    lines = [line.strip() for line in str(last).splitlines() if line.strip()] or [type(last).__name__]
    raise TraceError(f"torch.export: {lines[0]}\n  at {_user_line(last)}") from last


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _twice(value: Tensor) -> Tensor:
    """torch.export takes an axis of length 1 for a constant."""
    return torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value


def _user_line(error: BaseException) -> str:
    """``file:line in function: source`` of the innermost frame that is neither torch's nor ours."""
    here = str(Path(__file__).parent)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((_TORCH, here, "<"))
    ]  # fmt: skip
    return (
        f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"
        if frames
        else "?"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """torch.export's advice stays off the user's terminal; what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
