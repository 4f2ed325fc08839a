"""Policies: which codec for which parameter."""

from __future__ import annotations

from gradq.policy.allocate import Allocation, GradientStatistics, allocate_bits
from gradq.policy.base import AdaptivePolicy, Assignment, ParameterInfo, Plan, Policy, check_plan
from gradq.policy.bit_allocation import BitAllocation
from gradq.policy.fixed import ExactRule, FixedPolicy, check_feedback, exact_patterns, small_or_1d
from gradq.policy.mixed import MixedPolicy, Rules, roles
from gradq.policy.names import canonical_name, named_parameters
from gradq.policy.resolve import Asked, label, resolve, sends_all_as_it_is
from gradq.policy.spec import Spec

__all__ = [
    "AdaptivePolicy",
    "Allocation",
    "Asked",
    "Assignment",
    "BitAllocation",
    "ExactRule",
    "FixedPolicy",
    "GradientStatistics",
    "MixedPolicy",
    "ParameterInfo",
    "Plan",
    "Policy",
    "Rules",
    "Spec",
    "allocate_bits",
    "canonical_name",
    "check_feedback",
    "check_plan",
    "exact_patterns",
    "label",
    "named_parameters",
    "resolve",
    "roles",
    "sends_all_as_it_is",
    "small_or_1d",
]
