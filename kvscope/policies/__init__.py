"""Eviction policies, one file each; every file in this folder is registered automatically."""

from kvscope.policies.base import POLICIES, Policy, Protection, Step, parameter, policy

__all__ = ["POLICIES", "Policy", "Protection", "Step", "parameter", "policy"]
