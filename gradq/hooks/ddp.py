"""DistributedDataParallel: `HookState` and `hook`, which a framework or `compress` registers.

This module has no `from __future__ import annotations`: DDP compares the hook's annotations with real types.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradq.collectives import ranks_per_node
from gradq.errors import ConfigError, UnsupportedError
from gradq.hooks import averaged
from gradq.hooks._ddp_reducer import Trainer, after_backward, in_backward, unwrap_compiled, wrappers_of
from gradq.hooks.handle import CopiedHandle, GradientHandle
from gradq.options import Options, asked_for
from gradq.policy import Asked, Policy, Spec, label, resolve, sends_all_as_it_is
from gradq.sync.gradient_sync import GradientSync
from gradq.transport.handshake import meeting, telling

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gradq.options import OptionFields

__all__ = ["HookState", "hook"]


class HookState(GradientHandle):
    """The state of the hook of one DistributedDataParallel model, and the handle that `compress` returns.

    A copied or pickled state, such as that in `copy.deepcopy(model)`, is a `CopiedHandle`: it compresses
    nothing, and the copy of a model is averaged by DDP's own all-reduce.

    Constructing it is a collective call: all ranks of the group compare their settings and make process
    groups. Use it with the torch-native form::

        state = gradq.HookState(model, "int4")
        model.register_comm_hook(state, gradq.hook)

    Args:
        module: the model: DistributedDataParallel, which is best, or what it wraps. Compiled or not.
        spec: how gradients travel; a string, a codec, a `Spec`, a mapping of rules such as {"wte*": "int8",
            "*": "int4"} (see `MixedPolicy`), or a policy object such as `BitAllocation`. The strings:
            "none": DDP's own all-reduce, counted.
            "fp32", "bf16", "fp16": a cast, of everything.
            "int8" ... "int2", "rot4", "nf4", "sign" or any of `gradq.codecs.names()`: quantized. "int4" sends
            gradients in 4 bits and their means in more, by the number of ranks; "int4+int4" names the codec
            of both.
            "topk": the 1 % of largest magnitude in each block; "topk(percent=0.1)" fewer. Always with error
            feedback. Up to 4 ranks everyone sends to everyone; beyond, owners average and send on the largest
            2 % of the means (see docs/codecs.md).
            "powersgd:4": matrices as a product of rank 4, one average a step, always with error feedback (see
            `gradq.collectives.low_rank`); all else exact. "powersgd:4+int8" sends what is left in that codec.
        options: the options of the run, see `gradq.Options`.
        **overrides: any field of `gradq.Options`, which replaces that of options.

    Raises:
        ConfigError: an argument out of its range (SpecError for the spec).
        UnsupportedError: a model or process group that this version does not handle.
        MismatchError: ranks disagree; names the rank and the field.
    """

    sync: GradientSync
    _unsupported: UnsupportedError | None = None
    _successor: "HookState | None" = None

    def __init__(
        self,
        module: nn.Module,
        spec: Asked = "int8",
        options: Options | None = None,
        **overrides: "Unpack[OptionFields]",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UnsupportedError(f"gradq.HookState takes the model, got {averaged.kind(module)}")
        module = unwrap_compiled(module)
        group = asked_for("group", options, overrides)
        with telling(module.process_group if isinstance(module, DistributedDataParallel) else None):
            group = None if group is None else averaged.check_group(group)
            default = averaged.check_group(dist.group.WORLD)
            wrapper = averaged.find_wrapper(module, group)
        self._trainer = None if wrapper is None else Trainer(wrapper)
        self._owed = False  # whether to look, before the next step, at what DDP threw away
        self._must_confirm, self._group_was_given = wrapper is None, group is not None
        group = group or (default if wrapper is None else averaged.check_group(wrapper.process_group))
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        with meeting(group):
            self._options = Options.of("DDP", options, overrides)
            config = self._options.config(_ranks_per_node(self._options, group))
            self._names = averaged.averaged_names(inner, wrapper)
            self._unsupported = averaged.unsupported(inner, self._names)
            self._infos = averaged.describe(inner, self._names)
            self._world_size = group.size()
            self.spec, policy, remark = self.choose(spec)
            device = next(iter(self._names)).device
        self.sync = GradientSync(self._infos, policy, label(self.spec), group, config, device)
        weakref.finalize(module, self.sync.release)
        self.say(remark)

    def choose(self, spec: Asked) -> tuple[Spec | Policy, Policy | None, str]:
        """What was asked for, the policy it stands for, and what to say if it compresses nothing.

        The policy is None where a plain all-reduce does as well.

        Raises:
            SpecError, ConfigError: see `policy.resolve`; UnsupportedError: the model cannot be compressed.
        """
        asked, policy = resolve(spec, exact=self._options.exact, feedback=self._options.feedback)
        if policy is not None and self._unsupported is not None:
            raise self._unsupported
        infos, size = self._infos, self._world_size
        if policy is None or size == 1 or not sends_all_as_it_is(policy, infos, size):
            return asked, policy, ""
        plain = all(info.dtype in (torch.float32, torch.float64) for info in infos)  # summed as precisely
        how = "a plain all-reduce averages them" if plain else "they are averaged exactly"
        why = "all are small, have one dimension or are named by exact="
        remark = f"{label(asked)} compresses none of the {len(infos)} parameters ({why}): {how}"
        return asked, None if plain else policy, remark

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Average one DDP bucket; what `hook` calls.

        Raises:
            UnsupportedError: a gradient or a parameter that gradq cannot handle.
        """
        if self._successor is not None:
            return self._successor.average(bucket)
        flat, parameters = bucket.buffer(), bucket.parameters()
        if self._must_confirm:
            self._check_parameters(parameters)
            averaged.confirm_group(parameters[0], self.sync.group, asked=self._group_was_given)
            self._must_confirm = False
            if self._trainer is None and (found := wrappers_of(parameters[0])):
                self._trainer = Trainer(found[-1])
        if self._trainer is not None:
            self._trainer.check_join()
            self._watch(self._trainer, bucket)
        if bucket.index() == 0:
            self.sync.begin_step()
        names = [] if self.sync.is_plain else self._names_of(flat, parameters)
        mean = self.sync.average(flat, names, index=bucket.index())
        return self.sync.end_step(mean) if bucket.is_last() else mean

    def _names_of(self, flat: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[str]:
        if flat.is_sparse:
            raise UnsupportedError(
                "sparse gradients cannot be compressed; build nn.Embedding with sparse=False, or use the "
                'spec "none"'
            )
        self._check_parameters(parameters)
        return [self._names[parameter] for parameter in parameters]

    def _watch(self, trainer: Trainer, bucket: GradBucket) -> None:
        """Arrange that residuals stay as they are where DDP throws the mean away."""
        if in_backward():
            if bucket.is_last() and self.sync.has_feedback and trainer.leaves_out:
                after_backward(self._keep_unused)
            return
        if bucket.index() == 0 and self._owed:  # this rank has joined: there is no backward to wait for
            self._keep_unused()
        self._owed = bucket.is_last() and self.sync.has_feedback and trainer.leaves_out

    def _keep_unused(self) -> None:
        self._owed = False
        if self._trainer is not None:
            unused = self._trainer.unused(self._names)
            self.sync.not_applied(dict(zip(self._names.values(), unused, strict=True)))

    def _check_parameters(self, parameters: Sequence[torch.Tensor]) -> None:
        if not all(parameter in self._names for parameter in parameters):
            raise UnsupportedError(
                "DDP averages a parameter that the module given to gradq.HookState does not have (or that "
                "did not require a gradient then); make the state from the same module, after "
                "DistributedDataParallel"
            )

    def replace_by(self, successor: "HookState") -> None:
        """Hand this closed state's place in its model to another one; DDP keeps a hook for ever."""
        self._successor = successor


def _ranks_per_node(options: Options, group: dist.ProcessGroup) -> int:
    """The number of ranks on a node if that matters, else 1."""
    if options.collective == "hierarchical":
        return ranks_per_node(options.local_world_size, group.rank(), group.size())
    if options.local_world_size is not None:
        raise ConfigError('local_world_size= is for collective="hierarchical"')
    return 1


def hook(state: HookState, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: `model.register_comm_hook(gradq.HookState(model, "int4"), gradq.hook)`.

    Raises:
        UnsupportedError: it was called with something else than a state and DDP's bucket. ConfigError: the
            state is that of a copied model.
    """
    if not isinstance(state, HookState | CopiedHandle):
        raise UnsupportedError(
            f"gradq.hook got a {type(state).__name__} instead of its state; register it as "
            'model.register_comm_hook(gradq.HookState(model, "int4"), gradq.hook)'
        )
    if not isinstance(bucket, GradBucket):
        raise UnsupportedError(
            f"the hook got a {type(bucket).__name__} instead of a DDP bucket: torch.compile's "
            'optimize_ddp="python_reducer" is not supported; leave optimize_ddp at its default'
        )
    return state.average(bucket)
