"""Policies that are parameters of another policy: what they are refused with, and how they are spelled."""

from __future__ import annotations

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy


def require_nested(policy: Policy, name: str, nested: Policy, refusal: str | None, todo: str) -> None:
    """Check the policy that parameter `name` of another names, and give it one spelling, that of its label.

    Parameters
    ----------
    policy : Policy
        The policy with the parameter; called by its ``__post_init__``.
    name : str
        The parameter, a text.
    nested : Policy
        What the text names.
    refusal : str or None
        Why it cannot be used, as the end of a sentence.
    todo : str
        What to use.

    Raises
    ------
    UsageError
        If there is a refusal.
    """
    text = getattr(policy, name)
    if refusal:
        what = f"the base {text}" if name == "base" else f"{name}={text}"
        raise UsageError(f"{policy.name} cannot use {what}: {refusal}", todo)
    if ".py:" not in text:
        object.__setattr__(policy, name, nested.label)
