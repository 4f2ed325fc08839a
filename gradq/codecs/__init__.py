"""Codecs: one file a codec, one contract, this registry.

>>> from gradq import codecs
>>> "int4" in codecs.names()
True
>>> str(codecs.from_spec("int4(block_size=64)"))
'int4(block_size=64)'
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from importlib.metadata import entry_points

from gradq.codecs.base import Codec
from gradq.codecs.exact.codec import ExactCodec
from gradq.codecs.rotated.codec import RotatedCodec
from gradq.codecs.suggest import shown, suggestion
from gradq.codecs.topk.codec import TopKCodec
from gradq.codecs.uniform.codec import UniformCodec
from gradq.errors import ConfigError, SpecError

__all__ = [
    "Codec",
    "ExactCodec",
    "RotatedCodec",
    "TopKCodec",
    "UniformCodec",
    "from_spec",
    "names",
    "register",
]

_REGISTRY: dict[str, type[Codec]] = {}
_CONTRIB = "gradq.contrib"  # registers the baselines when a name is first looked up
_SPEC = re.compile(r"(?P<name>[\w.]+)(?P<options>.*)", re.DOTALL)


def register(codec: type[Codec], *codec_names: str) -> None:
    """Make a codec class available under names; `codec.from_name(name)` must build its default.

    Raises:
        ConfigError: a name is taken.
    """
    for name in codec_names:
        if _REGISTRY.get(name, codec) is not codec:
            raise ConfigError(f"codec name {name!r} is taken by {_REGISTRY[name].__name__}")
        _REGISTRY[name] = codec


@functools.cache
def _load_plugins() -> None:
    """Let the baselines and other packages register their codecs.

    An entry point of the group "gradq.codecs" names a function without arguments that calls `register`.

    Raises:
        ConfigError: a package's function fails, for ranks would differ in what they know without a word.
    """
    importlib.import_module(_CONTRIB)
    for plugin in entry_points(group="gradq.codecs"):
        try:
            plugin.load()()
        except Exception as error:
            package = plugin.dist.name if plugin.dist is not None else plugin.value
            raise ConfigError(
                f"the package {package!r} cannot register its codecs (entry point {plugin.name!r} = "
                f"{plugin.value!r}): {error!r}; mend or uninstall it"
            ) from error


def names() -> list[str]:
    """The names of all codecs, sorted: gradq's, the baselines of `gradq.contrib`, and other packages'."""
    _load_plugins()
    return sorted(_REGISTRY)


def from_spec(spec: str) -> Codec:
    """The codec for a spec such as "int4" or "int4(block_size=64,rounding=nearest)".

    Raises:
        SpecError: an unknown name or option, or text that is not a spec.
        ConfigError: an option outside its range.
    """
    _load_plugins()
    match = _SPEC.fullmatch(spec.strip())
    name, options = (match["name"], match["options"].strip()) if match is not None else ("", "")
    if name not in _REGISTRY or not _in_parentheses(options):
        raise SpecError(f"{_problem(spec, name)}{_hint(spec)} Choose from: {', '.join(names())}")
    codec = _REGISTRY[name].from_name(name)
    items = [item for item in options[1:-1].split(",") if item.strip()]
    return _with_options(codec, items, spec) if items else codec


def _in_parentheses(options: str) -> bool:
    """Whether this is nothing, or one pair of parentheses around the rest."""
    inside = options[1:-1]
    return not options or (options == f"({inside})" and not {"(", ")"} & set(inside))


def _problem(spec: str, name: str) -> str:
    """What is wrong with a spec that no codec is registered for."""
    if spec.strip().startswith("powersgd:"):
        return f"{shown(spec)} is no codec but a way to average, which only a whole spec can name"
    if name and name not in _REGISTRY:
        options = spec.strip().removeprefix(name).strip()
        return f"no codec is called {shown(name if _in_parentheses(options) else spec.strip())}"
    return f"{shown(spec)} is not a codec spec; write a name such as 'int4' or 'int4(block_size=64)'"


def _hint(spec: str) -> str:
    """What was probably meant, as the end of a sentence."""
    meant = suggestion(spec, _REGISTRY)
    return f"; did you mean {meant!r}?" if meant and meant != spec.strip() else "."


def _with_options(codec: Codec, options: list[str], spec: str) -> Codec:
    assert dataclasses.is_dataclass(codec)
    fields = {field.name: field for field in dataclasses.fields(codec)}
    changes: dict[str, object] = {}
    for option in options:
        key, equals, text = (part.strip() for part in option.partition("="))
        if not equals or key not in fields:
            raise SpecError(
                f"{shown(spec)}: {shown(option.strip())} is not an option; {codec.name} has "
                f"{', '.join(fields)}, written as name=value{_hint(spec)}"
            )
        if key in changes:
            raise SpecError(f"{shown(spec)}: {key} is given twice")
        current = getattr(codec, key)
        try:
            changes[key] = type(current)(text) if not isinstance(current, bool) else _boolean(text)
        except ValueError:
            raise SpecError(
                f"{shown(spec)}: {key} takes {type(current).__name__}, not {shown(text)}"
            ) from None
    changed = dataclasses.replace(codec, **changes)
    if changed.name != codec.name:
        raise SpecError(
            f"{shown(spec)}: the options contradict the name; that codec is called {changed.name!r}"
        )
    return changed


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


register(ExactCodec, "fp32", "bf16", "fp16", "fp64")
register(UniformCodec, *(f"int{bits}" for bits in range(2, 9)))
register(RotatedCodec, *(f"rot{bits}" for bits in range(1, 7)))
register(TopKCodec, "topk")
