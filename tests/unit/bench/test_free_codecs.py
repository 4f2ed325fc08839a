"""Free codecs: the bytes of every codec that has a name, the ones that need error feedback too."""

from __future__ import annotations

import pytest
import torch

from gradq import codecs
from gradq.bench.contenders import FreePolicy
from gradq.policy import FixedPolicy, ParameterInfo, Spec


@pytest.mark.parametrize("spec", [*codecs.names(), "int4+topk", "topk+int8"])
def test_a_free_codec_sends_the_bytes_and_keeps_no_residual(spec):
    weight = ParameterInfo(name="w", shape=(64, 64), dtype=torch.float32, index=0, world_size=4)
    free, real = FreePolicy(spec).plan([weight])["w"], FixedPolicy(spec=Spec.parse(spec)).plan([weight])["w"]
    assert free.phase1.nbytes(4096) == real.phase1.nbytes(4096)
    assert free.phase2.nbytes(4096) == real.phase2.nbytes(4096)
    assert not free.feedback1
    assert not free.feedback2
