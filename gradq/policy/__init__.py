"""Policies: which codec for which parameter."""

from __future__ import annotations

from gradq.policy.base import Assignment, ParameterInfo, Plan, Policy, check_plan
from gradq.policy.fixed import ExactRule, FixedPolicy, small_or_1d
from gradq.policy.spec import Spec

__all__ = [
    "Assignment",
    "ExactRule",
    "FixedPolicy",
    "ParameterInfo",
    "Plan",
    "Policy",
    "Spec",
    "check_plan",
    "small_or_1d",
]
