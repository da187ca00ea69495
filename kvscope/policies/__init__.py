"""Eviction policies, one file each: a file in this folder is found by itself."""

from kvscope.policies.base import POLICIES, Policy, Protection, Step, parameter, policy

__all__ = ["POLICIES", "Policy", "Protection", "Step", "parameter", "policy"]
