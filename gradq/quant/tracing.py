"""From a model to an fx graph of leaf layers, or an error that names the line that cannot be traced."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradq.errors import ConfigError, TraceError
from gradq.quant.batches import evaluating
from gradq.quant.config import Config
from gradq.quant.fake import FakeQuantize
from gradq.quant.layers import layer_kind
from gradq.quant.modules import QuantLayer

__all__ = [
    "ModeConstant",
    "QuantGraph",
    "bound_arguments",
    "example_arguments",
    "float_tensors",
    "merge_modes",
    "ordered_inputs",
    "trace",
]

_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace")
_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


class ModeConstant(nn.Module):
    """A constant that differs between training and evaluation, such as a functional dropout's rate.

    Args:
        train: value in training.
        eval: value in evaluation.
    """

    def __init__(self, train: Any, eval: Any) -> None:
        super().__init__()
        self.train_value, self.eval_value = train, eval

    def forward(self) -> Any:
        """The value for the current mode."""
        return self.train_value if self.training else self.eval_value


class QuantGraph(fx.GraphModule):
    """A graph module that keeps its ``meta`` when it is pickled (fx's own drops it).

    Attributes:
        only_evaluation: reason why the graph cannot be trained; empty if it can.
    """

    only_evaluation: str = ""

    def train(self, mode: bool = True) -> QuantGraph:
        """Set the mode, as in torch.

        Raises:
            TraceError: the model takes another path in training, and this is the graph of its evaluation.
        """
        if mode and self.only_evaluation:
            raise TraceError(f"this model was prepared for evaluation only: {self.only_evaluation}")
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantGraph:
        """A copy as fx makes it, with `only_evaluation`."""
        out: Any = super().__deepcopy__(memo)
        out.only_evaluation = self.only_evaluation
        graph: QuantGraph = out
        return graph

    def __reduce__(self) -> Any:
        """Pickle as fx does, with ``meta``, the mode and `only_evaluation`."""
        function, arguments = super().__reduce__()
        return _rebuild, (function, arguments, self.meta, self.training, self.only_evaluation)


def _rebuild(
    function: Any, arguments: Any, meta: dict[str, Any], training: bool, only_evaluation: str
) -> QuantGraph:
    plain = function(*arguments)
    out = QuantGraph(plain, plain.graph, type(plain).__name__)
    out.meta.update(meta)
    out.training, out.only_evaluation = training, only_evaluation
    return out


class _Tracer(fx.Tracer):
    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()  # fx makes a tracer without arguments when it unpickles
        self.record_stack_traces = True  # errors then name the line

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (QuantLayer, FakeQuantize)) or self.config.is_skipped(module_qualified_name):
            return True
        if layer_kind(m) is not None:  # also a subclass that computes what torch's layer does
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Drop assertions, which hold for the example; every other branch on a tensor is an error."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _HERE)):
            frame = frame.f_back
        if frame is not None:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if line.strip().startswith("assert "):
                return True
        return super().to_bool(obj)


@contextmanager
def _factories_accept_proxies() -> Iterator[None]:
    """Record ``torch.arange(x.size(1))`` and its like, whose sizes torch does not dispatch to fx."""
    from torch._dynamo import trace_rules  # dynamo lists torch's functions once, and must list the real ones

    trace_rules.get_torch_obj_rule_map()
    saved = {name: getattr(torch, name) for name in _FACTORIES}

    def wrap(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[fx.Proxy] = []
            fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else a)
            if found:
                return found[0].tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in saved.items():
            setattr(torch, name, wrap(function))
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


def example_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs: of a tensor, a tuple or list, or a dict.

    Raises:
        ConfigError: example inputs of another type, or none.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        return tuple(example_inputs), {}
    raise ConfigError(
        f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of arguments, "
        "or a dict of keyword arguments"
    )


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Example arguments by the names of ``forward``'s parameters.

    Raises:
        ConfigError: arguments that do not fit ``forward``.
    """
    signature = inspect.signature(model.forward)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ConfigError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from error


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config) -> fx.GraphModule:
    """Trace a model in both modes and merge the graphs.

    Arguments of ``forward`` that the example leaves out keep their defaults.

    Args:
        model: model to trace; the result shares its submodules.
        args: positional example arguments.
        kwargs: keyword example arguments.
        config: configuration; the modules that it skips become leaves and need not be traceable.

    Returns:
        A graph module whose leaves are torch's layers.

    Raises:
        TraceError: the model cannot be traced, or its structure depends on the mode.
    """
    given = bound_arguments(model, args, kwargs)
    signature = inspect.signature(model.forward)
    fixed = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not inspect.Parameter.empty
    }
    mode = model.training
    graphs = {}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        for training in (True, False):
            model.train(training)
            graphs[training] = _trace_once(model, fixed, config)
    finally:
        model.train(mode)
    changed = [n for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])]
    if changed:
        raise TraceError(
            f"{type(model).__name__}.forward changes the buffer {changed[0]} in place, which a "
            "graph cannot follow"
        )
    graph = graphs[False]
    only_eval = ""
    constants: dict[str, ModeConstant] = {}
    try:
        constants = merge_modes(graphs[True], graph, vars(model) | model._buffers, type(model))
    except TraceError as error:
        only_eval = str(error)
    _drop_fixed(graph)
    for name, module in constants.items():
        setattr(model, name, module)
    traced = QuantGraph(model, graph, type(model).__name__)
    for name in constants:
        delattr(model, name)
    for name in [n for n in vars(model) if n.startswith("_tensor_constant")]:
        delattr(model, name)
    for name in [n for n in model._buffers if n.startswith("_tensor_constant")]:
        delattr(model, name)
    if only_eval:
        traced.eval()
        traced.only_evaluation = only_eval
    else:
        traced.train(mode)
    return traced


def _trace_once(model: nn.Module, fixed: dict[str, Any], config: Config) -> fx.Graph:
    try:
        with _factories_accept_proxies():
            return _Tracer(config).trace(model, concrete_args=fixed or None)
    except Exception as error:
        where = _user_line(error)
        raise TraceError(f"cannot trace {type(model).__name__}: torch.fx: {error}\n  at {where}") from error


def _user_line(error: BaseException) -> str:
    """``file:line: source`` of the innermost frame that is neither torch's nor ours."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((_TORCH, _HERE, "<"))
    ]  # fmt: skip
    if not frames:
        return "unknown line"
    last = frames[-1]
    source = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{last.filename}:{last.lineno} in {last.name}: {source}"


def merge_modes(
    train: fx.Graph, evaluation: fx.Graph, attributes: Mapping[str, Any], kind: type[nn.Module]
) -> dict[str, ModeConstant]:
    """Compare the graphs of both modes; constants that differ become `ModeConstant` nodes of `evaluation`.

    Args:
        train: graph of the model in training.
        evaluation: graph of the model in evaluation; changed.
        attributes: name → value of the constants of both graphs.
        kind: class of the model, for errors.

    Returns:
        Name → module that a new node calls.

    Raises:
        TraceError: the modes take different paths; `evaluation` is then unchanged.
    """
    model_name = kind.__name__
    constants: dict[str, ModeConstant] = {}
    changes: list[tuple[fx.Node, int | str, str]] = []
    same: dict[fx.Node, fx.Node] = {}
    pairs = list(zip(train.nodes, evaluation.nodes, strict=False))
    for a, b in pairs:
        same[a] = b
        if (
            a.op != b.op
            or (a.target != b.target and not _equal_constants(a, b, attributes))
            or len(a.args) != len(b.args)
            or a.kwargs.keys() != b.kwargs.keys()
        ):
            raise TraceError(
                f"{model_name}.forward takes another path in training than in evaluation: {a.format_node()} "
                "against "
                f"{b.format_node()}; make the forward the same in both, or skip the module that holds it"
            )
        for key, (u, v) in _constants(a, b):
            if not _same(u, v, same):
                if _holds_node(u) or _holds_node(v):
                    raise TraceError(
                        f"{model_name}.forward reads other tensors in training than in evaluation: "
                        f"{a.format_node()} against {b.format_node()}; make the forward the same in both"
                    )
                name = f"mode_constant_{len(constants)}"
                constants[name] = ModeConstant(u, v)
                changes.append((b, key, name))
    if len(train.nodes) != len(evaluation.nodes):
        raise TraceError(
            f"{model_name}.forward does not do the same operations in training and in evaluation"
        )
    for b, key, name in changes:
        with evaluation.inserting_before(b):
            node = evaluation.call_module(name)
        if isinstance(key, int):
            b.update_arg(key, node)
        else:
            b.update_kwarg(key, node)
    return constants


def _equal_constants(a: fx.Node, b: fx.Node, attributes: Mapping[str, Any]) -> bool:
    """True if both nodes read equal tensors that forward made without its inputs."""
    if a.op != "get_attr" or not all(str(n.target) in attributes for n in (a, b)):
        return False
    u, v = (attributes[str(n.target)] for n in (a, b))
    if isinstance(u, nn.Parameter) or not isinstance(u, Tensor) or not isinstance(v, Tensor):
        return False
    return u.dtype == v.dtype and u.shape == v.shape and torch.equal(u, v)


def _constants(a: fx.Node, b: fx.Node) -> Iterator[tuple[int | str, tuple[Any, Any]]]:
    yield from enumerate(zip(a.args, b.args, strict=True))
    for key in a.kwargs:
        yield key, (a.kwargs[key], b.kwargs[key])


def _same(u: Any, v: Any, nodes: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(u, fx.Node) or isinstance(v, fx.Node):
        return isinstance(u, fx.Node) and nodes.get(u) is v
    if isinstance(u, (tuple, list)) and isinstance(v, (tuple, list)):
        return len(u) == len(v) and all(_same(x, y, nodes) for x, y in zip(u, v, strict=True))
    if isinstance(u, dict) and isinstance(v, dict):
        return list(u) == list(v) and all(_same(u[key], v[key], nodes) for key in u)
    if isinstance(u, slice) and isinstance(v, slice):
        return all(_same(x, y, nodes) for x, y in ((u.start, v.start), (u.stop, v.stop), (u.step, v.step)))
    return bool(type(u) is type(v) and (u is v or u == v))


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _drop_fixed(graph: fx.Graph) -> None:
    """Remove the placeholders of arguments that keep their defaults, with fx's assertions on them."""
    for node in list(graph.nodes):
        extra = str(node.target).startswith("*") and not node.users  # *args or **kwargs that nothing reads
        if node.op == "placeholder" and extra:
            graph.erase_node(node)
        elif node.op == "placeholder" and node.args and all(_is_assertion(user) for user in node.users):
            _erase_users(graph, node)
            graph.erase_node(node)


def _is_assertion(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return "assert" in name or (name == "eq" and all(_is_assertion(user) for user in node.users))


def _erase_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_users(graph, user)
        graph.erase_node(user)


def ordered_inputs(traced: fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Example arguments in the order of the graph's placeholders."""
    names = [str(n.target) for n in traced.graph.nodes if n.op == "placeholder"]
    return (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))


def float_tensors(traced: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """Run the example: name of every node whose value is a floating tensor → number of its dimensions."""
    found: dict[str, int] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                found[n.name] = value.ndim
            return value

    copied = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tuple(inputs))
    with evaluating(traced):
        Recorder(traced).run(*copied)
    return found
