"""Names of parameters: the same whether a module is compiled, wrapped, parametrized or plain.

Residuals, random bits and rules belong to parameters by name. So a model that is compiled after a checkpoint
finds its residuals again, and `exact=["wte*"]` means the same before and after it is wrapped.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

__all__ = ["canonical_name", "closest", "named_parameters"]

# Names that torch.compile, activation checkpointing and FullyShardedDataParallel put in.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")
# Names that torch.nn.utils.parametrize puts in, where the parametrization has one tensor.
_PARAMETRIZED = re.compile(r"(?:(?<=\.)|^)parametrizations\.([^.]+)\.original$")
_MODULE_OF = (DataParallel, DistributedDataParallel, AveragedModel)


def canonical_name(name: str) -> str:
    """A name as in `module.named_parameters()`, or a pattern over such names, without what wrappers add.

    Example:
        >>> canonical_name("_orig_mod.blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
        >>> canonical_name("fc.parametrizations.weight.original")
        'fc.weight'
    """
    return _PARAMETRIZED.sub(r"\1", _WRAPPERS.sub("", name)).removesuffix(".")


def named_parameters(module: nn.Module) -> dict[nn.Parameter, str]:
    """The canonical name of every parameter, in the order of `module.named_parameters()`.

    Besides what `canonical_name` leaves out, "module." is left out where DistributedDataParallel,
    DataParallel or AveragedModel put it. Where two parameters would then have one name, both keep their own.
    """
    skipped = {
        f"{path}.module." if path else "module."
        for path, child in module.named_modules()
        if isinstance(child, _MODULE_OF)
    }
    full = {parameter: name for name, parameter in module.named_parameters()}
    short = {parameter: canonical_name(_without(name, skipped)) for parameter, name in full.items()}
    times = Counter(short.values())
    return {p: name if times[name] == 1 else full[p] for p, name in short.items()}


def closest(wanted: str, names: Iterable[str]) -> str:
    """The names that were probably meant, as the end of a sentence."""
    known = list(names)
    close = difflib.get_close_matches(wanted, known, n=3)
    return f"; close: {', '.join(close)}" if close else f"; the first are: {', '.join(known[:3])}"


def _without(name: str, skipped: set[str]) -> str:
    """The name without the last segment of every prefix in skipped that it starts with."""
    return "".join(segment for prefix, segment in _segments(name) if prefix not in skipped)


def _segments(name: str) -> Iterator[tuple[str, str]]:
    """Every segment of a dotted name with its dot, and the name up to it."""
    prefix = ""
    for segment in re.findall(r"[^.]+\.?", name):
        prefix += segment
        yield prefix, segment
