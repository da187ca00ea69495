"""Eviction policies, one file each; every file in this folder is registered automatically."""

from kvscope.policies.base import POLICIES, Citation, Policy, Protection, Step, parameter, policy

__all__ = ["POLICIES", "Citation", "Policy", "Protection", "Step", "parameter", "policy"]
