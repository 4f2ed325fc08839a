"""Tables that a user wrote, checked against a dataclass: what is wrong is named with its remedy."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gradq.errors import ConfigError

__all__ = ["checked", "shown"]

_WORDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
_ITEMS = {int: "whole numbers", float: "numbers", str: "texts in quotes"}
_EXAMPLES = {int: "[0, 1, 2]", float: "[0.5, 1.0]", str: '["int8", "int4"]'}


def shown(value: Any) -> str:
    """A value as an error shows it: at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__} of more than 4300 digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def checked(
    cls: type,
    values: Mapping[str, Any],
    where: str,
    *,
    remedies: Mapping[str, str] | None = None,
    written: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values with lists as tuples, every key and type checked against a dataclass's fields.

    Args:
        cls: the dataclass.
        values: the values that were written, by key.
        where: the file and table, for the messages.
        remedies: key → what to write instead, for keys that people try and that do not exist.
        written: field → the key that files have for it, where that is another one.

    Raises:
        ConfigError: a key does not exist, or a value has the wrong type or is not finite; the message names
            where, the key, the value, what is legal, and what to write.
    """
    hints = typing.get_type_hints(cls)
    names = [(written or {}).get(name, name) for name in hints]
    found = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: no such key: {key} = {shown(value)}; {_instead(key, names, remedies)}"
            )
        if not _fits(value, hints[key]):
            raise ConfigError(
                f"{where}: {key} = {shown(value)} is not {_describe(hints[key])}{_example(value, hints[key])}"
            )
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def _instead(key: str, names: Sequence[str], remedies: Mapping[str, str] | None) -> str:
    remedy = (remedies or {}).get(key.lower().replace("-", "_"))
    if remedy is not None:
        return remedy
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.7)
    legal = f"there are: {', '.join(sorted(names))}"
    return f"did you mean {close[0]}? {legal}" if close else legal


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(entry, item) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond fp64
        return False


def _describe(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_ITEMS[typing.get_args(hint)[0]]}"
    return _WORDS.get(hint, str(getattr(hint, "__name__", hint)))


def _example(value: Any, hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        text = f"[{shown(value)}]" if _fits(value, item) else _EXAMPLES[item]
        return f": write {text}".replace("'", '"')
    if isinstance(value, str) and hint is not str:
        return ": write it without quotes" if _is_number(value) else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
