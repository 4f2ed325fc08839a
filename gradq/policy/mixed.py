"""Mixed: each parameter its own spec, by rules in order."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from gradq.codecs import Codec
from gradq.errors import ConfigError
from gradq.policy.base import Assignment, ParameterInfo
from gradq.policy.fixed import ExactRule, FixedPolicy
from gradq.policy.names import canonical_name, closest, named_parameters
from gradq.policy.spec import Spec

__all__ = ["ROLES", "MixedPolicy", "Rules", "Selector", "roles"]

Selector = str | Callable[[ParameterInfo], bool]
Rules = Mapping[str, str | Codec | Spec]

ROLES = ("embedding", "norm", "bias", "matmul", "other")
_ROLE = "role:"
_UNNAMED = Spec.parse("int8")  # says which parameters are exact though no rule selects them


@dataclass(frozen=True, kw_only=True)
class MixedPolicy:
    """The first rule that selects a parameter gives its spec.

    Small and one-dimensional parameters travel exact under every rule, as with `FixedPolicy`.

    Attributes:
        rules: pairs (selector, spec), or a mapping. A selector is a parameter's name, a shell pattern over
            names, a role such as "role:embedding" (see `roles`), or a predicate over `ParameterInfo`.
        default: the spec of what no rule selects; None: there must be nothing left.
        exact: the rule that says which parameters travel exact; see `FixedPolicy`.
        feedback: error feedback; see `FixedPolicy`.

    Raises:
        ConfigError: there is no rule, or a selector is of the wrong kind.
        SpecError: a spec is wrong.

    Example:
        >>> policy = MixedPolicy(rules=[("wte*", "int8"), ("role:matmul", "int4")], default="int6")
        >>> same = MixedPolicy(rules={"wte*": "int8", "*": "int4"})
    """

    rules: Sequence[tuple[Selector, str | Codec | Spec]] | Rules
    default: str | Codec | Spec | None = None
    exact: ExactRule = ()
    feedback: bool | str = "auto"
    _rules: tuple[tuple[Selector, Spec], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs = _pairs(self.rules)
        if not pairs and self.default is None:
            raise ConfigError('a mixed policy needs rules, such as {"wte*": "int8", "*": "int4"}')
        for selector, _ in pairs:
            _check_selector(selector)
        rules = tuple((selector, _quantizing(spec)) for selector, spec in pairs)
        if self.default is not None:
            rules += ((_everything, _quantizing(self.default)),)
        object.__setattr__(self, "_rules", rules)

    @property
    def specs(self) -> list[Spec]:
        """The specs of all rules, the default's too."""
        return [spec for _, spec in self._rules]

    def plan(self, parameters: Sequence[ParameterInfo]) -> dict[str, Assignment]:
        """An assignment for every parameter, by name.

        Raises:
            ConfigError: a rule selects nothing, or nothing that earlier rules leave; or a parameter worth
                compressing has no rule.
        """
        chosen = self._select(parameters)
        plans = {
            spec: FixedPolicy(spec=spec, exact=self.exact, feedback=self.feedback).plan(parameters)
            for spec in dict.fromkeys([*chosen.values(), _UNNAMED])
        }
        for parameter in parameters:
            if parameter.name not in chosen and not plans[_UNNAMED][parameter.name].exact:
                raise ConfigError(
                    f"no rule selects the parameter {parameter.name!r} of shape {parameter.shape}; "
                    'end the rules with "*", or give default='
                )
        return {p.name: plans[chosen.get(p.name, _UNNAMED)][p.name] for p in parameters}

    def _select(self, parameters: Sequence[ParameterInfo]) -> dict[str, Spec]:
        """The spec of every parameter that a rule selects."""
        taken: dict[str, int] = {}
        by_name = {parameter.name: parameter for parameter in parameters}
        for number, (selector, _) in enumerate(self._rules):
            found = _selected(selector, by_name)
            if not found and selector is not _everything:
                raise ConfigError(f"rule {_show(selector)} selects no parameter{_hint(selector, by_name)}")
            new = [name for name in found if name not in taken]
            if found and not new and selector is not _everything:
                earlier, first = self._rules[taken[found[0]]][0], found[0]
                raise ConfigError(
                    f"rule {_show(selector)} never applies: earlier rules take all that it selects "
                    f"({first!r} goes to {_show(earlier)}); the first match decides, so put it before them"
                )
            taken |= dict.fromkeys(new, number)
        return {name: self._rules[number][1] for name, number in taken.items()}


def roles(module: nn.Module) -> dict[str, str]:
    """What each parameter of a module is for, by canonical name: one of `ROLES`.

    "embedding": of nn.Embedding and nn.EmbeddingBag; "norm": of modules whose class has "norm" in its name;
    "matmul": any other of two dimensions or more; "bias": any other whose name ends in "bias"; "other": the
    rest. A parameter that two modules share has the role of its first.
    """
    names = named_parameters(module)
    found: dict[str, str] = {}
    for path, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            name = names[parameter]
            if name in found:
                continue
            owner = _owner(module, path, child)
            if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
                found[name] = "embedding"
            elif "norm" in type(owner).__name__.lower():
                found[name] = "norm"
            elif parameter.ndim >= 2:
                found[name] = "matmul"
            else:
                found[name] = "bias" if name.endswith("bias") else "other"
    return found


def _owner(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """The module that the parameters of child belong to: child, or what it is a parametrization of."""
    if not isinstance(child, ParametrizationList):
        return child
    return module.get_submodule(path.rpartition("parametrizations.")[0].removesuffix("."))


def _pairs(rules: object) -> list[tuple[Selector, str | Codec | Spec]]:
    """Pairs (selector, spec); raise ConfigError for anything else."""
    given = rules.items() if isinstance(rules, Mapping) else rules
    pairs: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if isinstance(rules, str) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            f"rules={rules!r:.200}: they must be pairs of a selector and a spec, such as "
            '{"wte*": "int8", "*": "int4"} or [("wte*", "int8"), ("*", "int4")]'
        )
    return pairs


def _everything(parameter: ParameterInfo) -> bool:
    return True


def _check_selector(selector: object) -> None:
    if isinstance(selector, str):
        if selector.startswith(_ROLE) and selector.removeprefix(_ROLE) not in ROLES:
            raise ConfigError(f"rule {selector!r}: the roles are {', '.join(ROLES)}")
    elif not callable(selector):
        raise ConfigError(
            f"a rule selects by a name, a pattern, a role or a predicate, not {type(selector).__name__}"
        )


def _quantizing(spec: str | Codec | Spec) -> Spec:
    parsed = Spec.parse(spec)
    if parsed.is_none:
        raise ConfigError('a rule cannot say "none": all parameters share one payload; say "fp32" or "bf16"')
    return parsed


def _selected(selector: Selector, by_name: Mapping[str, ParameterInfo]) -> list[str]:
    if not isinstance(selector, str):
        return [name for name, parameter in by_name.items() if selector(parameter)]
    selector = canonical_name(selector)
    if selector in by_name:  # a name is no pattern, even with [ in it
        return [selector]
    if selector.startswith(_ROLE):
        role = selector.removeprefix(_ROLE)
        return [name for name, parameter in by_name.items() if parameter.role == role]
    return [name for name in by_name if fnmatch.fnmatchcase(name, selector)]


def _show(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else f"<{getattr(selector, '__name__', 'predicate')}>"


def _hint(selector: Selector, by_name: Mapping[str, ParameterInfo]) -> str:
    if not isinstance(selector, str):
        return ""
    if selector.startswith(_ROLE):
        known = sorted({parameter.role for parameter in by_name.values()} - {""})
        return f"; there are: {', '.join(known)}" if known else "; roles are not known here"
    return closest(selector, by_name)
