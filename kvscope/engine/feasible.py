"""Whether a plan can run on a model and its sequences: checked once, when a job is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvscope.core.budget import Budget
from kvscope.core.errors import UsageError
from kvscope.core.options import PlanOptions, Prefill
from kvscope.engine.deciding import decided
from kvscope.engine.plan import EvictionPlan, require_room
from kvscope.engine.runs import runs_of
from kvscope.policies.base import Policy
from kvscope.policies.spec import Named, parse_policies
from kvscope.trace.reader import TokenSequence


@dataclass(frozen=True)
class Workload:
    """The sequences and layers that a plan is run on.

    Attributes
    ----------
    sequences : sequence of TokenSequence
        The prompt and length of each are checked.
    prefill : Prefill
        What happens during the prompt.
    layers : tuple of int
        Numbers of the layers that are simulated.
    kv_heads : tuple of int
        ``G`` of each of these layers.
    n_layers : int
        Layers of the model.
    """

    sequences: Sequence[TokenSequence]
    prefill: Prefill
    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    n_layers: int


def named_policies(policies: Named | Sequence[Named], params: Mapping[str, str] | None = None) -> list[Policy]:
    """Return one policy or several by their names, classes or objects, as `parse_policies`; raises as it does.

    An empty list raises UsageError too.
    """
    several = [policies] if isinstance(policies, (str, Policy, type)) else policies
    chosen = parse_policies(several, params)
    if not chosen:
        raise UsageError("no policy is given", "Name one or more: --policy h2o --policy tova")
    return chosen


def make_plan(policy: Policy, options: PlanOptions, *, latent: bool) -> EvictionPlan:
    """Return the plan of a policy with the user's choices, for a model with or without a latent cache.

    Raises
    ------
    UsageError
        As `EvictionPlan.make` and `decided`.
    """
    plan = EvictionPlan.make(policy, options.compress, options.allocate, options.accumulate)
    return decided(plan, options.scope, latent=latent)


def require_feasible(plan: EvictionPlan, budgets: Sequence[Budget], workload: Workload) -> None:
    """Raise UsageError if a plan cannot run under these budgets: phase, prefill, layers, room for protected keys."""
    plan.require(workload.prefill)
    for kv_heads in dict.fromkeys(workload.kv_heads):
        pairs = zip(workload.layers, workload.kv_heads, strict=True)
        plan.policy.fit(tuple(layer for layer, own in pairs if own == kv_heads), kv_heads, workload.n_layers)
    runs = runs_of([plan], budgets)
    rooms = {(run.keys(each, workload.prefill), each.prompt) for run in runs for each in workload.sequences}
    for budget, prompt in sorted(rooms):  # so that the smallest is named, whatever the order of budgets and sequences
        require_room(plan.policy, budget, prompt)
