"""What a test's fork server loads once, so that ranks start in milliseconds. Imported for its effect only."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib

from gradq import codecs

__all__: list[str] = []

# DDP's constructor imports torch._dynamo, which imports half of torch: 2 s in every rank. A rank also imports
# the module of the function that it runs, which is mostly a test: hence pytest and Hypothesis.
for _module in (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "pytest",
    "hypothesis",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_module)

for _spec in ("int8", "fp32"):
    codecs.from_spec(_spec).warm_up()

gc.collect()
gc.freeze()  # a collection in a rank looks at what is the rank's own, not at 400,000 objects of modules
atexit.register(gc.unfreeze)  # of the server: libraries that count what they leak print it otherwise
