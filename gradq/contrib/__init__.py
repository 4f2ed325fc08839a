"""Baselines for comparison: none of these codecs is the best choice at its size (docs/codecs.md)."""

from __future__ import annotations

from gradq import codecs
from gradq.contrib.table import TABLE_NAMES, TableCodec

__all__ = ["TABLE_NAMES", "TableCodec"]

codecs.register(TableCodec, *TABLE_NAMES)
