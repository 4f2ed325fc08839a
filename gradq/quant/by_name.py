"""`swap` replaces layers in place, by name, without tracing: for models whose forward no tracer sees through.

Each layer gets a quantizer of its own for its input, because there is no graph to place shared ones in. So
batch
norm is not folded, additions stay in float, and convolutional networks are slower than through `prepare`;
models whose time goes into linear layers lose nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradq.errors import UnsupportedError
from gradq.quant.attention import QuantMultiheadAttention
from gradq.quant.config import Config, chosen_config
from gradq.quant.fake import WeightQuant
from gradq.quant.info import FloatModel
from gradq.quant.layers import CONVOLUTIONS, layer_kind
from gradq.quant.lstm import QuantLSTM, why_lstm_stays_float
from gradq.quant.modules import QUANTIZED, QuantEmbedding, QuantLayer, QuantLinear
from gradq.quant.recurrent import QuantGRUCell, QuantLSTMCell, why_float
from gradq.quant.sameness import check_values
from gradq.quant.swapping import lookup_format
from gradq.quant.transposed import TRANSPOSED, why_transposed_stays_float

__all__ = ["SwapInfo", "swap", "swap_info", "unswapped"]

_KEY = "gradq_swap"
_WITH_WEIGHTS: Any = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.LSTM, nn.GRU, nn.RNN, nn.EmbeddingBag)


@dataclass
class SwapInfo:
    """What `swap` did.

    Attributes:
        config: the configuration as given.
        swapped: names of the layers that were replaced.
        float_islands: (name, reason) of layers with weights that stay in float.
        originals: name → the float layer, which shares every parameter with the quantized one.
        float_model: the model as it was, or None if it was not kept.
    """

    config: Config
    swapped: list[str] = field(default_factory=list)
    float_islands: list[tuple[str, str]] = field(default_factory=list)
    originals: dict[str, nn.Module] = field(default_factory=dict)
    float_model: FloatModel | None = None


def swap(model: nn.Module, config: Config | None = None, *, keep_float: bool = True) -> nn.Module:
    """Replace linear layers, convolutions, embeddings, attention and cells by quantized ones, in place.

    Then call `gradq.quant.calibrate`, train if you like, and export with ``example_inputs``.

    Args:
        model: any model.
        config: formats, and names to skip; its placement is not used. None: as for `gradq.quant.prepare`.
        keep_float: keep a copy of the model as it is now, on the CPU, for `gradq.export.verify`.

    Returns:
        The model.

    Raises:
        UnsupportedError: nothing to replace, or the model was swapped or prepared before, or a parameter that
            has no values yet.
        NonFiniteError: a weight that holds NaN or Inf; named.
    """
    config = chosen_config(config)
    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise UnsupportedError(f"{type(model).__name__} has quantized layers already; swap a float model")
    check_values(model)
    info = SwapInfo(config, float_model=FloatModel(model) if keep_float else None)
    shared: dict[int, tuple[Tensor, WeightQuant]] = {}
    made: dict[int, nn.Module] = {}
    inside: set[str] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        parent = name.rpartition(".")[0]
        if not name or any(name.startswith(f"{done}.") for done in inside):
            continue
        if any(config.is_skipped(".".join(name.split(".")[: i + 1])) for i in range(name.count(".") + 1)):
            if module._parameters:
                info.float_islands.append((name, "skipped by the configuration"))
            continue
        if id(module) not in made:
            new = _quantized(model, name, module, config)
            if new is None:
                if isinstance(module, _WITH_WEIGHTS):
                    info.float_islands.append((name, _why_not(name, module, config)))
                continue
            weight = new.effective_weight()
            known = shared.setdefault(id(weight), (weight, new.weight_quant))[1]
            if known.format == new.weight_quant.format:
                new.weight_quant = known
            made[id(module)] = new
        if isinstance(module, nn.MultiheadAttention):
            inside.add(name)
        info.swapped.append(name)
        info.originals[name] = module
        setattr(model.get_submodule(parent), name.rpartition(".")[2], made[id(module)])
    if not info.swapped:
        raise UnsupportedError(f"{type(model).__name__} has no layer that can be quantized")
    model.__dict__[_KEY] = info
    return model


def swap_info(model: nn.Module) -> SwapInfo | None:
    """What `swap` did to a model, or None."""
    found = model.__dict__.get(_KEY)
    return found if isinstance(found, SwapInfo) else None


def unswapped(model: nn.Module) -> nn.Module:
    """A float copy of a swapped model, with the weights as they are now; the model is untouched."""
    out: Any = copy.deepcopy(model)
    info: SwapInfo = out.__dict__.pop(_KEY)
    for name, original in info.originals.items():
        parent, _, leaf = name.rpartition(".")
        original.train(out.get_submodule(name).training)
        setattr(out.get_submodule(parent), leaf, original)
    return out  # type: ignore[no-any-return]


def _why_not(name: str, module: nn.Module, config: Config) -> str:
    """Why a layer with weights stays in float."""
    if isinstance(module, nn.LSTM):
        return why_lstm_stays_float(module, config, name) or ""
    if isinstance(module, nn.RNNBase):
        return why_float(module)
    if isinstance(module, tuple(TRANSPOSED)) and (reason := why_transposed_stays_float(module)):
        return reason
    return f"{type(module).__name__} has no quantized form here"


def _quantized(model: nn.Module, name: str, module: nn.Module, config: Config) -> QuantLayer | None:
    kind = next((k for k in TRANSPOSED if isinstance(module, k)), None) or layer_kind(module)
    if kind in TRANSPOSED and why_transposed_stays_float(module):
        return None
    if isinstance(module, nn.LSTM) and why_lstm_stays_float(module, config, name):
        return None
    convolution = kind in CONVOLUTIONS or kind in TRANSPOSED
    embedding = isinstance(module, nn.Embedding)
    whole_channels = convolution or isinstance(module, nn.LSTM)
    fmt = config.weight_format(name, convolution=whole_channels, embedding=embedding)
    if isinstance(module, nn.Embedding):
        fmt = lookup_format(model, module, name, config)
    if fmt is None:
        return None
    act = config.activation_format(convolution=convolution)
    kw = {"observer": config.observer, "weight_observer": config.weight_observer, "name": name}
    plain: Any = module
    if convolution:
        return (QUANTIZED | TRANSPOSED)[kind].from_float(plain, fmt, act, **kw)  # type: ignore[index, no-any-return]
    if isinstance(module, nn.LSTM):
        return QuantLSTM.from_float(module, fmt, weight_observer=config.weight_observer, name=name)
    if kind is nn.Linear:
        return QuantLinear.from_float(plain, fmt, act, **kw)
    if embedding and plain.max_norm is None and not plain.sparse:
        return QuantEmbedding.from_float(plain, fmt, **kw)
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            return None
        return QuantMultiheadAttention.from_float(module, fmt, act, num_inputs=3, **kw)
    if isinstance(module, (nn.LSTMCell, nn.GRUCell)):
        cell = QuantLSTMCell if isinstance(module, nn.LSTMCell) else QuantGRUCell
        return cell.from_float(module, fmt, act, **kw)  # type: ignore[no-any-return]
    return None
