"""What a test's fork server loads once, so that ranks start in milliseconds. Imported for its effect only."""

from __future__ import annotations

from gradq import codecs

__all__: list[str] = []

for _spec in ("int8", "fp32"):
    codecs.from_spec(_spec).warm_up()
