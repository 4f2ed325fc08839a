"""What was meant by a spec that does not exist: the words that other tools use, and slips of the pen."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection

__all__ = ["shown", "suggestion"]

# What others call it, in lower case without spaces, dashes and underscores.
_ALIASES = {
    "fp32": ("float32", "float", "f32", "single", "full", "exact"),
    "fp64": ("float64", "double", "f64"),
    "fp16": ("float16", "half", "f16"),
    "bf16": ("bfloat16", "bfloat", "brainfloat", "16bit", "16bits", "int16", "16", "amp"),
    "fp8_e4m3": ("fp8", "float8", "f8", "e4m3", "float8e4m3", "float8e4m3fn", "e4m3fn"),
    "fp8_e5m2": ("e5m2", "float8e5m2", "bf8"),
    "mxfp4": ("fp4", "float4", "e2m1", "mx"),
    "sign": ("int1", "1bit", "1bits", "onebit", "signsgd", "efsignsgd", "binary", "1"),
    "ternary": ("terngrad", "int1.58", "1.58bit"),
    "topk": ("top", "dgc", "sparse", "sparsify", "sparsification", "deepgradientcompression", "randomk"),
    "powersgd:4": ("lowrank", "powersgd", "power"),
    "rot4": ("rot", "rotated", "hadamard", "rotation"),
    "rot1": ("trellis1",),
    "rot2": ("trellis2", "trellis"),
    "rot3(levels=trellis)": ("trellis3",),
    "rot4(levels=trellis)": ("trellis4",),
    "int4": ("4", "int"),
    "int8": ("8", "byte", "uint8", "quantized", "quantize"),
    "qsgd8": ("qsgd",),
    "none": ("off", "no", "false", "dense", "allreduce", "plain", "disabled", "identity"),
}
_BY_ALIAS = {alias: spec for spec, aliases in _ALIASES.items() for alias in aliases}
_BITS = re.compile(r"(?:u?int|i|q|uint)?([2-8])(?:b|bit|bits)?")
_OUT_OF_RANGE = re.compile(r"u?int([0-9]{1,4})")
_POWER = re.compile(r"power(?:sgd)?[:=(]?(?:rank=?|r=?)?([0-9]{1,6})[)]?")
_TOPK = re.compile(r"top(?:k|[0-9.]+)?[:=(]?(?:k=|percent=)?([0-9]{1,3}(?:[.][0-9]{1,6})?)%?[)]?")
_LONGEST = 64  # of a text that is worth guessing at


def shown(text: str) -> str:
    """The text in quotes, its middle left out if it is long."""
    short = reprlib.Repr()
    short.maxstring = _LONGEST
    return short.repr(text)


def suggestion(text: str, known: Collection[str]) -> str | None:
    """A spec that was probably meant, None if there is nothing close.

    Args:
        text: what was written.
        known: the names of all codecs.
    """
    if len(text) > _LONGEST:
        return None
    words = [word for word in re.split(r"[\s,/|]+", text) if word]
    if len(words) == 2 and all(word in known for word in words):
        return "+".join(words)
    name, parenthesis, options = text.partition("(")
    return _meant(text, known) or (parenthesis and _with(options, _meant(name, known), known)) or None


def _with(options: str, name: str | None, known: Collection[str]) -> str | None:
    """A suggested name with the options that were written, after those that it has."""
    if name is None or name.partition("(")[0] not in known:
        return name
    return f"{name[:-1]},{options.strip()}" if name.endswith(")") else f"{name}({options.strip()}"


def _meant(text: str, known: Collection[str]) -> str | None:
    plain = re.sub(r"[\s_-]", "", text.lower())
    by_plain = {name.replace("_", ""): name for name in known}
    if plain in by_plain:
        return by_plain[plain]
    if plain in _BY_ALIAS:
        return _BY_ALIAS[plain]
    if (match := _POWER.fullmatch(plain)) is not None and int(match[1]) > 0:
        return f"powersgd:{int(match[1])}"
    if (match := _BITS.fullmatch(plain)) is not None:
        return f"int{match[1]}"
    if (match := _TOPK.fullmatch(plain)) is not None and 0.01 <= float(match[1]) <= 50:
        return f"topk(percent={float(match[1]):g})"
    if _OUT_OF_RANGE.fullmatch(plain):
        return "int8"
    close = difflib.get_close_matches(plain, by_plain, n=1)
    return by_plain[close[0]] if close else None
