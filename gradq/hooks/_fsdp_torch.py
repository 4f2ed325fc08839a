"""Everything gradq uses of FSDP2 that torch does not call public, in one place.

Checked on torch 2.9, 2.13 and 2.14. A name that is missing raises `UnsupportedError` with the version in it,
never a guess. Nothing of torch.distributed.fsdp is imported before a model uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradq.errors import UnsupportedError
from gradq.policy import canonical_name

__all__ = [
    "Shard",
    "Unit",
    "find_units",
    "is_fully_sharded",
    "reduce_scatter",
    "unmanaged_parameters",
]


def _missing(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} is not available in torch {torch.__version__}: FSDP2 with gradq needs torch 2.9 or newer "
        "(tested up to 2.14)"
    )


def _need(thing: Any, name: str) -> Any:
    if not hasattr(thing, name):
        raise _missing(f"{type(thing).__name__}.{name}")
    return getattr(thing, name)


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and any(isinstance(module, kind) for module in model.modules())


@dataclass(frozen=True)
class Shard:
    """One parameter of a unit.

    Attributes:
        name: the name in `named_parameters()`, without the names of wrappers.
        shape: the shape of the whole parameter.
        dim: the dimension that is sharded.
        shard_numel: the number of elements that every rank holds, padding included.
        reduce_dtype: the dtype of its gradient when it is reduced.
        gather_dtype: the dtype of the parameter when it is gathered.
        handle: the FSDPParam of torch.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    shard_numel: int
    reduce_dtype: torch.dtype
    gather_dtype: torch.dtype
    handle: Any

    @property
    def requires_grad(self) -> bool:
        """Whether it is trained at the moment."""
        return bool(self.handle.sharded_param.requires_grad)

    def has_gradient(self, zeros_too: bool) -> bool:
        """Whether the next reduction of its unit will hold its gradient."""
        handle = self.handle
        if not hasattr(handle, "_unsharded_param"):
            return False
        return (
            handle.unsharded_accumulated_grad is not None
            or handle.unsharded_param.grad is not None
            or (zeros_too and handle.unsharded_param.requires_grad)
        )


class _Comm:
    """FSDP's interface of a reduction or a gathering: memory, and a call.

    Args:
        call: a function of FSDP's arguments: output_tensor, input_tensor, group, async_op, and op to reduce.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call(*args, **kwargs)


class Unit:
    """What one call of `fully_shard` manages: parameters that are gathered and reduced together.

    Attributes:
        index: the position in the model.
        path: the path of the module in the model.
        shards: the shards of its parameters, in the order of FSDP's buffers.
        reducing: the names whose gradients the reduction under way holds.
    """

    def __init__(self, index: int, path: str, module: nn.Module, group: Any, names: dict[int, str]) -> None:
        self.index, self.path = index, path
        self._module, self._group = module, group
        self.shards = [_shard(handle, group.mp_policy, names) for handle in _need(group, "fsdp_params")]
        self.reducing: list[str] = []
        self._undo: dict[str, Callable[[], None]] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._group.device
        return device

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks it is sharded over; None if it is replicated only."""
        return getattr(self._group.mesh_info, "shard_process_group", None)

    @property
    def replicate_group(self) -> dist.ProcessGroup | None:
        """The ranks it is replicated over, if there are any."""
        return getattr(self._group.mesh_info, "replicate_process_group", None)

    @property
    def divide_factor(self) -> float | None:
        """What gradients are divided by, None for the number of ranks."""
        factor: float | None = _need(self._group, "gradient_divide_factor")
        return factor

    @property
    def all_reduces(self) -> bool:
        """Whether replicas are averaged now (`set_requires_all_reduce`)."""
        return bool(_need(self._group, "all_reduce_grads"))

    @property
    def gathers_in_smaller_groups(self) -> bool:
        """Whether `reshard_after_forward` is a number of ranks."""
        after = self._group.post_forward_mesh_info
        return after is not None and after != self._group.mesh_info

    def watch(self) -> None:
        """Keep `reducing` up to date: FSDP leaves out parameters that have no gradient."""
        inner = _need(self._group, "post_backward")

        def post_backward(*unused: Any) -> Any:
            zeros_too = bool(getattr(self._group, "reduce_scatter_unused_params", False))
            self.reducing = [shard.name for shard in self.shards if shard.has_gradient(zeros_too)]
            return inner(*unused)

        self._group.post_backward = post_backward
        self._undo["watch"] = lambda: delattr(self._group, "post_backward")

    def set_comm(self, what: str, call: Callable[..., None]) -> None:
        """Have FSDP call a function in the place of its own communication.

        Args:
            what: "reduce_scatter" or "all_gather".
            call: the function; see `_Comm`.

        Raises:
            UnsupportedError: the unit already has one that is not FSDP's, or this torch has no such hook.
        """
        install = _need(self._module, f"set_custom_{what}")
        before = _need(self._group, f"_{what}_comm")
        if type(before).__name__ != f"Default{what.title().replace('_', '')}":
            found = (
                f"module {self.path!r} already has a custom {what.replace('_', '-')}, {type(before).__name__}"
            )
            if isinstance(before, _Comm):
                found += (
                    ": another gradq handle compresses it. Close that one first; or, if two models share the "
                    "module, call gradq.compress once: on an nn.ModuleList of both"
                )
            raise UnsupportedError(found)
        install(_Comm(call))
        self._undo[what] = lambda: install(before)

    def set_replica_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Call hook(shard of the gradients) in place of FSDP's own all-reduce over the replicas.

        FSDP has no hook *instead of* its all-reduce. So its group is shown a mesh without replicas: the shard
        dimension only, or none; parameters and gradients remain DTensors on the whole mesh.
        """
        group = self._group
        if getattr(group, "_all_reduce_hook", None) is not None:
            raise UnsupportedError(f"module {self.path!r} already has an all-reduce hook")
        if self.replicate_group is not None:
            from torch.distributed.fsdp._fully_shard import _fsdp_common

            kind = "DataParallelMeshInfo" if self.shard_group is None else "FSDPMeshInfo"
            if not hasattr(_fsdp_common, kind):
                raise _missing(f"a compressed all-reduce ({kind})")
            mesh_info, after = group.mesh_info, group.post_forward_mesh_info
            names = ("mesh", "shard_mesh_dim", "replicate_mesh_dim", "dp_mesh_dims", "spmd_mesh")
            options = {name: getattr(mesh_info, name) for name in names if hasattr(mesh_info, name)}
            sharded = getattr(_fsdp_common, kind)(**options)
            group.mesh_info = sharded
            if after is mesh_info:
                group.post_forward_mesh_info = sharded

            def restore() -> None:
                group.mesh_info = mesh_info
                if group.post_forward_mesh_info is sharded:
                    group.post_forward_mesh_info = mesh_info

            self._undo["mesh"] = restore
        _need(self._module, "set_all_reduce_hook")(hook)
        self._undo["replicas"] = lambda: setattr(group, "_all_reduce_hook", None)

    def restore(self, keep_replica_hook: bool = False) -> None:
        """Give FSDP its own communication back, except for the hook over replicas if that shall stay."""
        kept = {"watch", "replicas"} if keep_replica_hook else set()
        for what in reversed([what for what in self._undo if what not in kept]):
            self._undo.pop(what)()


def _shard(handle: Any, policy: Any, names: dict[int, str]) -> Shard:
    info = _need(handle, "_module_info")
    dtype = handle.sharded_param.dtype
    gather_dtype = policy.param_dtype or dtype
    path = names.get(id(info.module))
    if path is None:
        raise UnsupportedError(f"the module that holds {info.param_name!r} is not in the model")
    return Shard(
        name=f"{path}.{info.param_name}" if path else info.param_name,
        shape=tuple(_need(handle, "_orig_size")),
        dim=_need(handle, "fsdp_placement").dim,
        shard_numel=_need(handle, "padded_sharded_param_size").numel(),
        reduce_dtype=policy.reduce_dtype or gather_dtype,
        gather_dtype=gather_dtype,
        handle=handle,
    )


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a model, in the order of its modules.

    Raises:
        UnsupportedError: the model uses meshes per parameter, or another torch.
    """
    from torch.distributed.fsdp import FSDPModule

    paths = {id(module): canonical_name(path) for path, module in reversed(list(model.named_modules()))}
    units: list[Unit] = []
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        path = paths[id(module)]
        groups = _groups(module)
        if len(groups) > 1:
            raise UnsupportedError(
                f"module {path!r} shards its parameters over several meshes (shard_placement_fn); gradq "
                "compresses units of one mesh"
            )
        for group in groups:
            if id(group) in seen:  # fully_shard([a, b]) has one group for both
                continue
            seen.add(id(group))
            units.append(Unit(len(units), path, module, group, paths))
    return units


def _groups(module: Any) -> Sequence[Any]:
    state = _need(module, "_get_fsdp_state")()
    if hasattr(state, "_fsdp_param_groups"):
        groups: Sequence[Any] = state._fsdp_param_groups
        return groups
    single = _need(state, "_fsdp_param_group")  # before 2.12
    return [] if single is None else [single]


def unmanaged_parameters(model: nn.Module, units: Sequence[Unit]) -> Iterator[str]:
    """Names of trained parameters that no unit manages."""
    managed = {shard.name for unit in units for shard in unit.shards}
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if (
            canonical_name(name) not in managed
            and parameter.requires_grad
            and not isinstance(parameter, DTensor)
        ):
            yield canonical_name(name)


def reduce_scatter(output: Tensor, flat: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    """FSDP's own reduction."""
    single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    single(output, flat, op=op, group=group)
