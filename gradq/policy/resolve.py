"""From what a user asks for, a spec in any form or a policy, to the policy that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradq.codecs import Codec, ExactCodec
from gradq.policy.base import ParameterInfo, Policy
from gradq.policy.fixed import ExactRule, FixedPolicy, as_it_is
from gradq.policy.mixed import MixedPolicy, Rules
from gradq.policy.spec import Spec

__all__ = ["Asked", "label", "resolve", "sends_all_as_it_is"]

Asked = str | Codec | Spec | Policy | Rules


def resolve(
    asked: Asked, *, exact: ExactRule = (), feedback: bool | str = "auto"
) -> tuple[Spec | Policy, Policy | None]:
    """The spec or policy that was asked for, and the policy it stands for: None for "none".

    Args:
        asked: a string, a codec, a `Spec`, a mapping of rules, or a policy object.
        exact: the rule that says which parameters travel exact; see `FixedPolicy`. Policy objects ignore it.
        feedback: error feedback; see `FixedPolicy`. Policy objects ignore it.

    Raises:
        SpecError: asked is something else; ConfigError: exact or feedback has a value that cannot work.
    """
    if isinstance(asked, Mapping):
        mixed = MixedPolicy(rules=asked, exact=exact, feedback=feedback)
        return mixed, mixed
    if not isinstance(asked, str | Codec | Spec | type) and callable(getattr(asked, "plan", None)):
        return asked, asked
    parsed = Spec.parse(asked)  # type: ignore[arg-type]  # it says what is wrong with anything else
    if parsed.is_none:
        return parsed, None
    return parsed, FixedPolicy(spec=parsed, exact=exact, feedback=feedback)


def label(asked: Spec | Policy) -> str:
    """A name that is equal on all ranks; the `repr` of a policy may hold addresses."""
    return str(asked) if isinstance(asked, Spec) else getattr(asked, "label", type(asked).__name__)


def sends_all_as_it_is(policy: Policy, parameters: Sequence[ParameterInfo], world_size: int) -> bool:
    """Whether a policy made from a spec that quantizes leaves every gradient in its own dtype.

    Never of a spec that casts, such as "fp32": that is what was asked for. Nor of a policy of one's own.
    """
    specs = _specs(policy)
    if not specs or any(isinstance(spec.phase1, ExactCodec) for spec in specs):
        return False
    plan = policy.plan([replace(parameter, world_size=world_size) for parameter in parameters])
    return all(plan[parameter.name] == as_it_is(parameter) for parameter in parameters)


def _specs(policy: Policy) -> list[Spec]:
    if isinstance(policy, FixedPolicy):
        return [policy.spec]
    return policy.specs if isinstance(policy, MixedPolicy) else []
