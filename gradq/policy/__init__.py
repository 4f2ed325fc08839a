"""Policies: which codec for which parameter."""

from __future__ import annotations

from gradq.policy.base import Assignment, ParameterInfo, Plan, Policy
from gradq.policy.fixed import ExactRule, FixedPolicy, small_or_1d
from gradq.policy.spec import Spec

__all__ = ["Assignment", "ExactRule", "FixedPolicy", "ParameterInfo", "Plan", "Policy", "Spec", "small_or_1d"]
