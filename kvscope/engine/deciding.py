"""Who decides: each key/value head, or the heads of a layer as one, which is the default where they share one cache.

A latent cache (DeepSeek and others) has one vector per token for all heads of a layer, and holds it as long as any head
holds its key. Heads that evict different keys save little there, so one decision for the layer is the default: the
cache has one key/value head that all query heads read, and a policy reduces them as it reduces the heads of a group.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

from kvscope.core.errors import UsageError
from kvscope.engine.allocation import ALLOCATORS
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.base import Policy, Scope
from kvscope.policies.tuned import Tuned

SCOPES: tuple[Scope, ...] = ("kv_head", "layer")
# Signals without an axis of key/value heads. Of the others, such as keys, nothing says what they are for a whole layer.
OF_LAYERS = frozenset({"weights", "full_weights", "schedule", "mean_query"})


def decided(plan: EvictionPlan, scope: str | None = None, *, latent: bool = False) -> EvictionPlan:
    """Return the plan with what decides in it: as the user says, otherwise the layer in a model with a latent cache.

    Parameters
    ----------
    plan : EvictionPlan
        How the policy is run.
    scope : {"kv_head", "layer"} or None
        The user's choice.
    latent : bool
        Whether the heads of a layer share one latent cache. A policy that cannot decide for a layer, or whose own
        parameter was set otherwise, then stays as it is.

    Raises
    ------
    UsageError
        If the choice is unknown, or the policy cannot be run so.
    """
    if scope is None:
        by_default = latent and not _chosen(plan.policy) and why_not_by_layer(plan) is None
        return _with(plan, "layer") if by_default else plan
    if scope not in SCOPES:
        raise UsageError(f"--scope {scope!r} is unknown", f"Use one of: {', '.join(SCOPES)}.")
    own = "scope" in _parameters(plan.policy)
    why_not = why_not_by_layer(plan) if scope == "layer" else _why_not_by_head(plan, own)
    if why_not is not None and scope != plan.decides:
        raise UsageError(f"--scope {scope} cannot be used with {plan.policy.label}: {why_not}", "Omit --scope for it.")
    return _with(plan, "layer" if scope == "layer" else "kv_head")


def why_not_by_layer(plan: EvictionPlan) -> str | None:
    """Return why the heads of a layer cannot decide as one in a plan, as the end of a sentence; None if they can."""
    policy, traits = plan.policy, plan.policy.traits
    if traits.scope == "layer":
        return None
    if traits.reads:
        return "it holds every key, and reads some"
    if traits.published:
        return "it reproduces published code, in which each head decides"
    if ALLOCATORS.get(plan.allocate).spans == "heads":
        return f"allocation {plan.allocate} gives each head its own budget"
    if isinstance(policy, Tuned) and any(len(row) > 1 for row in policy.choice):
        return "its heads have settings of their own"
    of_heads = sorted(plan.needs - OF_LAYERS)
    return f"it reads {of_heads[0]} of each key/value head" if of_heads else None


def _why_not_by_head(plan: EvictionPlan, own: bool) -> str | None:
    return None if own or plan.policy.traits.scope == "kv_head" else "its rule is one decision for the layer"


def _with(plan: EvictionPlan, scope: Scope) -> EvictionPlan:
    """Return the plan with this scope: by the policy's own parameter if it has one."""
    policy = plan.policy
    if "scope" in _parameters(policy):
        return replace(plan, policy=replace(policy, scope=scope))  # type: ignore[call-arg]  # a parameter of this class
    return plan if scope == plan.decides else replace(plan, scope=scope)


def _parameters(policy: Policy) -> set[str]:
    return {item.name for item in fields(policy) if item.init}


def _chosen(policy: Policy) -> bool:
    """Return whether a policy's own parameter says what decides, otherwise than by default."""
    usual = {item.name: item.default for item in fields(policy)}.get("scope", MISSING)
    return usual is not MISSING and policy.scope != usual
