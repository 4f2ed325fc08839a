"""Quantization-aware training and post-training quantization that export without surprises.

The path: `prepare` → `calibrate` → (train) → `finalize` → `integer_reference` or `gradq.export`.
"""

from gradq.quant.attention import QuantMultiheadAttention
from gradq.quant.by_name import SwapInfo, swap, swap_info
from gradq.quant.calibrate import calibrate
from gradq.quant.config import Config, detect_target
from gradq.quant.control import ControlReport, prepare_within
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.info import float_model, prepare_info
from gradq.quant.lstm import QuantLSTM
from gradq.quant.mixed import assign_bits, average_bits, choose_bits, model_bytes
from gradq.quant.modules import QuantConv1d, QuantConv2d, QuantConv3d, QuantEmbedding, QuantLinear
from gradq.quant.prepare import finalize, prepare, restore
from gradq.quant.readers import input_quantizers
from gradq.quant.recurrent import QuantGRUCell, QuantLSTMCell
from gradq.quant.reference import IntegerReference, integer_reference
from gradq.quant.refine import correct_bias, round_weights
from gradq.quant.second_order import gptq
from gradq.quant.sensitivity import SensitivityReport, divergence, sensitivity
from gradq.quant.smoothing import ScalingReport, awq, smooth
from gradq.quant.training import RangeSchedule, param_groups

__all__ = [
    "ActQuant",
    "Config",
    "ControlReport",
    "Format",
    "IntegerReference",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantEmbedding",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMultiheadAttention",
    "RangeSchedule",
    "ScalingReport",
    "SensitivityReport",
    "SwapInfo",
    "WeightQuant",
    "assign_bits",
    "average_bits",
    "awq",
    "calibrate",
    "choose_bits",
    "correct_bias",
    "detect_target",
    "divergence",
    "finalize",
    "float_model",
    "gptq",
    "input_quantizers",
    "integer_reference",
    "model_bytes",
    "param_groups",
    "parse_format",
    "prepare",
    "prepare_info",
    "prepare_within",
    "restore",
    "round_weights",
    "sensitivity",
    "smooth",
    "swap",
    "swap_info",
]
