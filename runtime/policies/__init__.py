"""Policies: what decides what every denoising step does."""

from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import DIFFERENCE_ORDER, Decision, Policy, RunHistory
from ddit.runtime.policies.budget import Budgeted
from ddit.runtime.policies.dynamic import Dynamic, statistic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.parse import parse_schedule
from ddit.runtime.policies.progressive import Progressive
from ddit.runtime.policies.reuse import Prediction, Reuse, Reusing

__all__ = [
    "DIFFERENCE_ORDER",
    "Adaptive",
    "Budgeted",
    "Decision",
    "Dynamic",
    "Fixed",
    "Native",
    "Policy",
    "Prediction",
    "Progressive",
    "Reuse",
    "Reusing",
    "RunHistory",
    "parse_schedule",
    "statistic",
]
