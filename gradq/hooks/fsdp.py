"""FSDP2: `compress` for models that `fully_shard` was applied to, with or without replicas (HSDP).

Plain FSDP2 (a mesh of one dimension): the reduce-scatter of every unit is compressed. With replicas (a mesh
of two dimensions, or `replicate_group=`): the reduce-scatter inside the node stays FSDP's own unless asked,
and the average over replicas is compressed. Parameters may be gathered in 8 bits (`gather_spec`).

CUDA tensors take the same way, enqueued on the stream that FSDP calls it on, without error feedback. That was
tested with CPU tensors over the channels of CUDA ones; not run on a GPU.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradq.codecs import Codec, ExactCodec
from gradq.errors import ConfigError, UnsupportedError
from gradq.hooks import _fsdp_torch, sharded
from gradq.hooks._backward import OutermostBackward
from gradq.hooks._fsdp_torch import Shard, Unit
from gradq.hooks.handle import GradientHandle
from gradq.metrics import Event, Stats
from gradq.options import Options, SyncConfig, asked_for
from gradq.policy import AdaptivePolicy, Asked, FixedPolicy, ParameterInfo, Plan, Policy, Spec, label, resolve
from gradq.sync.gradient_sync import GradientSync
from gradq.sync.sharded_sync import ShardedSync
from gradq.transport.handshake import telling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradq.options import OptionFields

__all__ = ["ShardedHandle"]

_log = logging.getLogger("gradq")


class ShardedHandle(GradientHandle):
    """The handle that `compress` returns for a model sharded by `fully_shard`.

    Constructing it is a collective call over all ranks of the model's mesh. A step is one backward that
    reduces gradients. What FSDP computes stays as it is: the reduction's dtype (`MixedPrecisionPolicy`), its
    divide factor (`set_gradient_divide_factor`), mean or sum, gradient accumulation. NaN and Inf appear in
    the gradient of the rank that owns the shard, as in plain FSDP.

    A rank holds buffers for the encoded gradients of its largest unit. Error feedback is off unless asked
    for, because its local residual is as large as the *unsharded* gradient: two fp32 copies, 8 bytes for
    every element of the whole model on every rank. Without it 4 bits round stochastically. With replicas the
    residual is of the shard only, and the default is that of DDP.

    Args:
        model: a module with `fully_shard` applied to it, its parts, or both; or FSDP2's `replicate`.
        spec: how gradients travel, see `HookState`. With replicas: between the replicas.
        options: the options of the run, see `gradq.Options`; sizes in `exact` are those of whole parameters.
        **overrides: any field of `gradq.Options`, which replaces that of options.

    Raises:
        UnsupportedError: a set-up that cannot be compressed, or a torch without the hooks.
        ConfigError, MismatchError: see `HookState`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Asked = "int8",
        options: Options | None = None,
        **overrides: Unpack[OptionFields],
    ) -> None:
        self._units = _fsdp_torch.find_units(model)
        if not self._units:
            raise UnsupportedError("fully_shard was applied to modules without parameters only")
        shard_group, self._alone = sharded.common_group(self._units, "shard_group"), None
        if shard_group is None:  # `replicate`: a rank holds everything, as if it were the only shard
            shard_group = self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        native = sharded.common_group(self._units, "replicate_group")
        asked_group = asked_for("replicate_group", options, overrides)
        self._own_replicas = native is None and isinstance(asked_group, dist.ProcessGroup)
        replicate_group: dist.ProcessGroup | None = asked_group if self._own_replicas else native
        if replicate_group is not None and replicate_group.size() == 1 and self._alone is None:
            replicate_group, self._own_replicas = None, False  # a mesh of 1 x S is plain FSDP
        self._has_replicas = replicate_group is not None
        self._partial: dict[int, Tensor] = {}
        with telling(replicate_group), telling(shard_group):  # the other ranks wait in the handshake
            self._options = chosen = Options.of("FSDP2", options, overrides)
            config = chosen.config()
            if native is not None and asked_group is not None:
                raise ConfigError("replicate_group= was given, but the model's mesh already has replicas")
            if not self._has_replicas and chosen.collective != "auto":
                raise ConfigError(f"collective={chosen.collective!r}: FSDP2 without replicas has only one")
            if not self._has_replicas and chosen.shard_spec != "none":
                raise ConfigError(
                    "shard_spec= is for models with replicas; spec is the reduce-scatter's here"
                )
            sharded.check(model, self._units)
            self.spec, policy = self._resolve(spec)
            shard_label, shard_policy = (label(self.spec), policy)
            if self._has_replicas:
                asked, shard_policy = resolve(chosen.shard_spec, exact=chosen.exact, feedback=False)
                shard_label = label(asked)
            self._shards = ShardedSync(
                sharded.describe(self._all()),
                {shard.name: shard.shard_numel for shard in self._all()},
                shard_policy,
                shard_label,
                shard_group,
                dataclasses.replace(config, collective="auto"),
                self._gather_plan(chosen.gather_spec),
                self._units[0].device,
            )
        self.sync = self._shards
        if replicate_group is not None:
            self.sync = self._shards.replicas = self._replicas(policy, replicate_group, config)
        shards = self._shards
        self._backward = OutermostBackward(shards.begin_step, shards.end_step, shards.abandon)
        try:
            self._check_feedback(self._shards.plan, of_whole=True)
            self._check_feedback(self.sync.plan)
            self._install()
        except BaseException:
            self.close()
            raise
        self._say_what_it_costs()

    def _resolve(self, spec: Asked) -> tuple[Spec | Policy, Policy | None]:
        """What was asked for, and the policy it stands for."""
        feedback = self._options.feedback
        if feedback == "auto" and not self._has_replicas:
            feedback = False
        return resolve(spec, exact=self._options.exact, feedback=feedback)

    def choose(self, spec: Asked) -> tuple[Spec | Policy, Policy | None, str]:
        """What was asked for, and the policy for shards that it stands for; there is nothing to remark.

        Raises:
            SpecError, ConfigError: see `policy.resolve`; UnsupportedError: FSDP2 cannot do it.
        """
        asked, policy = self._resolve(spec)
        if self.sync is not self._shards:
            policy = self._for_shards(policy)
        if policy is not None:
            plan = policy.plan(list(self.sync.parameters.values()))
            self._check_feedback(plan, of_whole=self.sync is self._shards)
        return asked, policy, ""

    def _all(self) -> list[Shard]:
        return [shard for unit in self._units for shard in unit.shards]

    def _check_feedback(self, plan: Plan, *, of_whole: bool = False) -> None:
        sharded.check_feedback(plan, self._all(), self._units[0].device, of_whole=of_whole)

    def _gather_plan(self, spec: str | Codec | Spec) -> Plan:
        parsed = Spec.parse(spec)
        if parsed.phase1 is None:
            return {}
        if not (parsed.phase1.unbiased or isinstance(parsed.phase1, ExactCodec)):
            raise ConfigError(f"gather_spec={str(parsed)!r} rounds weights with a bias; use int8 or bf16")
        for unit in self._units:
            if unit.gathers_in_smaller_groups:
                raise UnsupportedError(
                    f"module {unit.path!r} reshards to fewer ranks after forward; gather_spec= needs "
                    "reshard_after_forward to be True or False"
                )
        infos = sharded.describe(self._all(), "gather_dtype")
        return FixedPolicy(spec=parsed, exact=self._options.exact, feedback=False).plan(infos)

    def _replicas(self, policy: Policy | None, group: dist.ProcessGroup, config: SyncConfig) -> GradientSync:
        """What averages this rank's shards over the replicas."""
        infos = [
            ParameterInfo(name=shard.name, shape=(shard.shard_numel,), dtype=shard.reduce_dtype, index=index)
            for index, shard in enumerate(self._all())
        ]
        own = dataclasses.replace(config, seed=_shard_seed(config.seed, self._shards.rank))
        device = self._units[0].device
        return GradientSync(infos, self._for_shards(policy), label(self.spec), group, own, device)

    def _for_shards(self, policy: Policy | None) -> Policy | None:
        if isinstance(policy, AdaptivePolicy):
            raise UnsupportedError(
                f"{label(self.spec)} plans again during training, which FSDP2 has no place for"
            )
        return None if policy is None else sharded.ForWhole(policy, self._all())

    # --- what FSDP calls --------------------------------------------------------------------------------

    def _install(self) -> None:
        for unit in self._units:
            if not self._has_replicas or self._shards.plan:
                unit.set_comm("reduce_scatter", partial(self.reduce, unit))
            if self._has_replicas:
                unit.set_replica_hook(partial(self.average_replicas, unit))
            if self._shards.gather_plan:
                unit.set_comm("all_gather", partial(self.gather, unit))
            unit.watch()

    def reduce(
        self, unit: Unit, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, **unused: Any
    ) -> None:
        """Reduce the gradients of one unit; what FSDP calls in the place of its reduce-scatter."""
        shards = self._shards
        self._backward.enter()
        if shards.is_plain or shards.world_size == 1:  # torch 2.9 reduces over one rank, later ones do not
            nbytes = input_tensor.nbytes * (shards.world_size - 1) // shards.world_size
            for kind in ("dense_bytes", "wire_bytes"):
                shards.metrics.record(Event(kind, nbytes, shards.step, unit.index))
            _fsdp_torch.reduce_scatter(output_tensor, input_tensor, op, group)
            return
        factor = _factor(op, unit, shards.world_size)
        shards.reduce_scatter(input_tensor, output_tensor, unit.reducing, index=unit.index, factor=factor)

    def gather(
        self, unit: Unit, output_tensor: Tensor, input_tensor: Tensor, group: Any, **unused: Any
    ) -> None:
        """Gather the parameters of one unit; what FSDP calls in the place of its all-gather."""
        row = output_tensor.view(group.size(), -1)[group.rank()]
        if row.data_ptr() != input_tensor.data_ptr():
            row.copy_(input_tensor.view(-1))
        self._shards.all_gather(output_tensor, [shard.name for shard in unit.shards], index=unit.index)

    def average_replicas(self, unit: Unit, shard: Tensor) -> None:
        """Average the reduced gradients of one unit over the replicas.

        As in FSDP itself, with `set_gradient_divide_factor` replicas are summed, and while
        `set_requires_all_reduce(False)` holds they are only collected.
        """
        sync = self._shards.replicas
        assert sync is not None
        self._backward.enter()
        if self._shards.is_plain:
            self._shards.enter(unit.index)
        if not unit.all_reduces:
            partial = self._partial.setdefault(unit.index, torch.zeros_like(shard))
            partial += shard
            shard.zero_()
            return
        if unit.index in self._partial:
            shard += self._partial.pop(unit.index)
        if sync.failure is not None:
            raise sync.failure
        # The header of a message holds the index, and wire format 1 counts units from 1 there.
        sync.wait(sync.average(shard, unit.reducing, index=unit.index + 1))
        if unit.divide_factor is not None:
            shard *= sync.world_size

    # --- the handle -------------------------------------------------------------------------------------

    def discard_step(self) -> None:
        """See `GradientHandle.discard_step`."""
        self._shards.discard_step()

    @property
    def failure(self) -> BaseException | None:
        """What stopped the averaging, None while it works; `backward()` raises it as it is."""
        return self._shards.failure or self.sync.failure

    def stats(self, *, parameters: bool = False) -> Stats:
        """Totals of this rank; with replicas, what gradq sends among shards counts as inside the node.

        What FSDP sends by itself is not in them: gathered parameters without `gather_spec`, and with replicas
        the reduce-scatter without `shard_spec`.
        """
        stats = self.sync.stats(parameters)
        if self.sync is self._shards:
            return stats
        inside = self._shards.stats()
        return dataclasses.replace(stats.plus(inside), intra_node_bytes=inside.wire_bytes)

    @property
    def checkpoint_path(self) -> tuple[str, ...]:
        """Where under the key of a checkpoint this rank's state stands: replicas of a shard share one."""
        shards = self._shards
        return () if self.sync is shards else (f"shard{shards.rank}of{shards.world_size}",)

    @property
    def checkpoint_groups(self) -> list[dist.ProcessGroup]:
        """The ranks that load a checkpoint together: replicas of a shard, then the shards of a replica."""
        return list(dict.fromkeys((self.sync.group, self._shards.group)))

    def gathered_state_dict(self) -> dict[str, Any]:
        """See `GradientHandle.gathered_state_dict`. With replicas: the parts of all shards, by name."""
        gathered = super().gathered_state_dict()
        if self.sync is self._shards:
            return gathered
        first = {} if self.sync.rank else gathered
        everyone: list[dict[str, Any]] = [{}] * self._shards.world_size
        group = self._shards.group
        dist.gather_object(
            first, everyone if self._shards.rank == 0 else None, dist.get_global_rank(group, 0), group
        )
        return {name: state for part in everyone for name, state in part.items()}

    def close(self) -> None:
        """End gradq's threads and process groups. FSDP's own reduction goes on. Idempotent.

        With `replicate_group=` gradq's plain all-reduce goes on averaging the replicas.
        """
        for unit in self._units:
            unit.restore(keep_replica_hook=self._own_replicas)
        super().close()
        self._shards.close()
        if self._alone is not None:
            dist.destroy_process_group(self._alone)
            self._alone = None

    def _say_what_it_costs(self) -> None:
        shards = self._shards
        numel = sum(shards.parameters[name].numel for name, entry in shards.plan.items() if entry.feedback1)
        if numel and shards.world_size > 1:
            _log.warning(
                "error feedback under FSDP2 keeps 2 copies of the unsharded gradient on every rank: %.1f MB",
                numel * (8 if shards.config.residual_dtype == "fp32" else 4) / 1e6,
            )


def _factor(op: Any, unit: Unit, world_size: int) -> float:
    """What to multiply the mean by for the reduction that FSDP asks for."""
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return float(world_size)
    divide_factor = unit.divide_factor
    if divide_factor is None:
        raise UnsupportedError(f"module {unit.path!r} reduces gradients with {op}; gradq knows mean and sum")
    return world_size / divide_factor


def _shard_seed(seed: int, rank: int) -> int:
    """The seed of a rank's shards: ranks differ in their random bits."""
    return (seed + (rank << 48)) % (1 << 64)
