"""The names gradq uses of FSDP2 that torch does not call public: a missing one is said, not guessed."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import gradq
from gradq.hooks import _backward, _fsdp_torch
from gradq.policy import canonical_name


@pytest.mark.parametrize("name", ["set_custom_reduce_scatter", "_get_fsdp_state"])
def test_a_torch_without_the_hook_is_named(name: str) -> None:
    message = re.escape(f"{name} is not available in torch {torch.__version__}")
    with pytest.raises(gradq.UnsupportedError, match=message):
        _fsdp_torch._need(nn.Linear(2, 2), name)


def test_the_names_exist_in_this_torch() -> None:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_common

    for name in ("set_custom_reduce_scatter", "set_custom_all_gather", "set_all_reduce_hook"):
        assert hasattr(FSDPModule, name), name
    assert hasattr(_fsdp_common, "FSDPMeshInfo")
    assert _backward.backward_id() == -1


def test_a_plain_module_is_not_sharded() -> None:
    assert not _fsdp_torch.is_fully_sharded(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("blocks.0._checkpoint_wrapped_module.up", "blocks.0.up"),
        ("_orig_mod.blocks._checkpoint_wrapped_module", "blocks"),
        ("_checkpoint_wrapped_module", ""),
        ("up", "up"),
    ],
)
def test_wrappers_leave_no_trace_in_names(path: str, name: str) -> None:
    assert canonical_name(path) == name
