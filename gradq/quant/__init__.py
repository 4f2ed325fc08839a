"""Quantization-aware training and post-training quantization that export without surprises.

The path: `prepare` → `calibrate` → (train) → `finalize` → `integer_reference` or `gradq.export`.
"""

from gradq.quant.calibrate import calibrate
from gradq.quant.config import Config, detect_target
from gradq.quant.fake import ActQuant, WeightQuant
from gradq.quant.formats import Format, parse_format
from gradq.quant.prepare import finalize, prepare, restore
from gradq.quant.reference import integer_reference

__all__ = ["ActQuant", "Config", "Format", "WeightQuant", "calibrate", "detect_target", "finalize", "integer_reference", "parse_format", "prepare", "restore"]
