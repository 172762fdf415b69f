"""Policies: what decides the level of every denoising step."""

from ddit.runtime.policies.base import DIFFERENCE_ORDER, Decision, Policy, RunHistory
from ddit.runtime.policies.budget import Budgeted
from ddit.runtime.policies.dynamic import Dynamic, statistic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.parse import parse_schedule

__all__ = [
    "DIFFERENCE_ORDER",
    "Budgeted",
    "Decision",
    "Dynamic",
    "Fixed",
    "Native",
    "Policy",
    "RunHistory",
    "parse_schedule",
    "statistic",
]
