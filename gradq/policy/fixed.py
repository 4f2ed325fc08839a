"""Fixed: one spec for all parameters worth compressing, exact for the rest."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from gradq.codecs import Codec, ExactCodec
from gradq.errors import ConfigError
from gradq.policy.base import Assignment, ParameterInfo
from gradq.policy.names import canonical_name, closest
from gradq.policy.spec import Spec

__all__ = [
    "EXACT_BELOW_NUMEL",
    "ExactRule",
    "FixedPolicy",
    "as_it_is",
    "check_feedback",
    "exact_patterns",
    "small_or_1d",
]

EXACT_BELOW_NUMEL = 1024

ExactRule = str | Sequence[str] | Callable[[ParameterInfo], bool]

_NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def small_or_1d(parameter: ParameterInfo) -> bool:
    """The default rule for what travels exact: fewer than 1024 elements, or one dimension."""
    return parameter.numel < EXACT_BELOW_NUMEL or parameter.ndim <= 1


@dataclass(frozen=True, kw_only=True)
class FixedPolicy:
    """The same spec for every parameter that is not exact.

    Attributes:
        spec: the spec, which must not be "none".
        exact: the rule that says which parameters travel exact, in their own dtype. A predicate over
            `ParameterInfo` is the whole rule. Names and shell patterns are short for "what the default rule
            selects, and these". The default rule is `small_or_1d` for specs that quantize, and nothing for
            casts such as "bf16", which send all parameters in that dtype. With low rank the default rule and
            the patterns keep parameters out of it too.
        feedback: "auto" (what the codec wants, see `Codec.wants_feedback`, and for low rank), True or False.
    """

    spec: Spec
    exact: ExactRule = ()
    feedback: bool | str = "auto"

    def __post_init__(self) -> None:
        check_feedback(self.feedback)
        if self.spec.low_rank and self.feedback is False:
            raise ConfigError(
                f"feedback=False with {self.spec}: what the low rank leaves out would be lost in every "
                'step, and training does not converge; use feedback="auto"'
            )

    def plan(self, parameters: Sequence[ParameterInfo]) -> dict[str, Assignment]:
        """An assignment for every parameter, by name.

        fp64 gradients always travel exact: the quantized codecs compute in fp32. Low rank is for the matrices
        where its factors take fewer bytes than the parameter would otherwise.

        Raises:
            ConfigError: a pattern matches no parameter, or error feedback was asked for a codec that does not
                contract.
        """
        rest = None if self.spec.low_rank and self.spec.phase1 is None else self.spec.codecs()
        casts = rest is None or all(isinstance(codec, ExactCodec) for codec in rest)
        is_exact = self._exact_rule(parameters, default=(lambda _: False) if casts else small_or_1d)
        never_low_rank = self._exact_rule(parameters, default=small_or_1d)
        sizes = {p.world_size for p in parameters} if rest is not None else set()
        compressed = {size: self.assignment(size) for size in sizes}
        plan = {}
        for parameter in parameters:
            fp64 = parameter.dtype == torch.float64
            native = fp64 or rest is None or is_exact(parameter)
            entry = as_it_is(parameter) if native else compressed[parameter.world_size]
            if self.spec.low_rank and parameter.ndim > 1 and not fp64 and not never_low_rank(parameter):
                factors = _low_rank(self.spec.low_rank)
                saves = factors.payload_bytes(parameter) < entry.payload_bytes(parameter)
                entry = factors if saves else entry
            plan[parameter.name] = entry
        return plan

    def assignment(self, world_size: int | None = None) -> Assignment:
        """How what is not exact travels among so many ranks (None: unknown)."""
        codec1, codec2 = self.spec.codecs(world_size)
        feedback1, feedback2 = self._feedback(codec1), self._feedback(codec2)
        return Assignment(
            phase1=codec1.for_feedback(feedback1),
            phase2=codec2.for_feedback(feedback2),
            feedback1=feedback1,
            feedback2=feedback2,
        )

    def _feedback(self, codec: Codec) -> bool:
        if isinstance(codec, ExactCodec):
            return False
        if self.feedback == "auto":
            return codec.wants_feedback and codec.for_feedback(True).contractive
        return bool(self.feedback)

    def _exact_rule(
        self, parameters: Sequence[ParameterInfo], default: Callable[[ParameterInfo], bool]
    ) -> Callable[[ParameterInfo], bool]:
        if callable(self.exact):
            return self.exact
        patterns = [canonical_name(pattern) for pattern in exact_patterns(self.exact)]
        names = [parameter.name for parameter in parameters]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"exact={pattern!r} matches no parameter{closest(pattern, names)}")
        chosen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
        return lambda parameter: parameter.name in chosen or default(parameter)


def check_feedback(feedback: object) -> None:
    """Raise ConfigError unless feedback is one of the choices of `FixedPolicy.feedback`."""
    if not isinstance(feedback, bool | str) or feedback not in ("auto", True, False):
        raise ConfigError(f"feedback={feedback!r:.200}: choose 'auto', True or False")


def exact_patterns(exact: str | Sequence[str]) -> tuple[str, ...]:
    """The names and patterns that `FixedPolicy.exact` gives, where it is not a predicate.

    Raises:
        ConfigError: it is something else.
    """
    given = (exact,) if isinstance(exact, str) else exact
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(
            f"exact={exact!r:.200}: it must be names or shell patterns such as 'wte.weight' or "
            "['head.*', '*.gate'], or a predicate over ParameterInfo"
        )
    return patterns


def as_it_is(parameter: ParameterInfo) -> Assignment:
    """Exact, in the gradient's own dtype."""
    codec = ExactCodec(dtype=_NATIVE[parameter.dtype])
    return Assignment(phase1=codec, phase2=codec)


def _low_rank(rank: int) -> Assignment:
    fp32 = ExactCodec()
    return Assignment(phase1=fp32, phase2=fp32, feedback1=True, collective="low_rank", low_rank=rank)
