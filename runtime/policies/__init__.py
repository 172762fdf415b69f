"""Policies: what decides what every denoising step does."""

from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import DIFFERENCE_ORDER, Change, Decision, Policy, RunHistory
from ddit.runtime.policies.budget import Budgeted
from ddit.runtime.policies.dpcache import DPCache
from ddit.runtime.policies.dynamic import Dynamic, statistic, statistics
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.parse import parse_schedule
from ddit.runtime.policies.progressive import Progressive
from ddit.runtime.policies.reuse import Prediction, Reuse, Reusing
from ddit.runtime.policies.spectralcache import SpectralCache
from ddit.runtime.policies.taylorseer import TaylorSeer
from ddit.runtime.policies.teacache import TeaCache

__all__ = [
    "DIFFERENCE_ORDER",
    "Adaptive",
    "Budgeted",
    "Change",
    "DPCache",
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
    "SpectralCache",
    "TaylorSeer",
    "TeaCache",
    "parse_schedule",
    "statistic",
    "statistics",
]
