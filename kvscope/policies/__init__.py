"""Eviction policies: one file each. Importing this package registers them."""

from kvscope.policies import a2sf, full, h2o, random, streaming_llm, tova, window
from kvscope.policies.base import POLICIES, Policy, Protection, Step, parameter, policy

__all__ = [
    "POLICIES",
    "Policy",
    "Protection",
    "Step",
    "a2sf",
    "full",
    "h2o",
    "parameter",
    "policy",
    "random",
    "streaming_llm",
    "tova",
    "window",
]
