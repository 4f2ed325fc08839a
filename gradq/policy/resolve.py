"""From what a user asks for, a spec in any form or a policy, to the policy that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

from gradq.codecs import Codec
from gradq.policy.base import Policy
from gradq.policy.fixed import ExactRule, FixedPolicy
from gradq.policy.mixed import MixedPolicy, Rules
from gradq.policy.spec import Spec

__all__ = ["Asked", "label", "resolve"]

Asked = str | Codec | Spec | Policy | Rules


def resolve(
    asked: Asked, *, exact: ExactRule = (), feedback: bool | str = "auto"
) -> tuple[Spec | Policy, Policy | None]:
    """The spec or policy that was asked for, and the policy it stands for: None for "none".

    Args:
        asked: a string, a codec, a `Spec`, a mapping of rules, or a policy object.
        exact: for all but policy objects, see `FixedPolicy`.
        feedback: for all but policy objects, see `FixedPolicy`.

    Raises:
        SpecError: it is none of these; ConfigError: exact or feedback has a value that cannot work.
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
