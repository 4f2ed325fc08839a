"""What a test's fork server loads once, so that ranks start in milliseconds. Imported for its effect only."""

from __future__ import annotations

import torch
import torch._dynamo  # DistributedDataParallel's constructor imports it

import gradq  # noqa: F401
from gradq.codecs.uniform.format import kernels_for

__all__: list[str] = []

kernels_for(torch.device("cpu")).warm_up()
