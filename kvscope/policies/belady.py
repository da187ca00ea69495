"""Belady: the best that a policy without return of evicted keys could do. It uses all later rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Scope, Step, parameter, policy
from kvscope.policies.citation import Citation


@policy("belady")
@dataclass(frozen=True)
class Belady(Policy):
    """Evict so that later rows lose the least attention mass: the bound for every policy that cannot restore keys.

    Score of key ``j``: the step after which the optimal schedule evicts it. The schedule is computed in advance from
    all full rows of the head, each the mean of its query heads; it is an exact assignment of keys to steps. No policy
    that holds as many keys at every step retains more mass in any head. With ``scope=layer`` this holds for policies
    that decide per layer.

    This is the optimal replacement of L. A. Belady (IBM Systems Journal 5(2), 1966, doi:10.1147/sj.52.0078), for keys
    that have weights and do not return. It is a bound and cannot be deployed, because it uses later rows.

    >>> from kvscope.replay.example import held
    >>> held("belady", [[1], [.5, .5], [.1, .6, .3], [.7, .0, .2, .1]], budget=2)[:3]
    [[0], [0, 1], [0, 2]]
    """

    needs = frozenset({"schedule"})
    clairvoyant = True
    formula = "S[j] = the step after which the schedule that loses least attention mass evicts j"
    paper = "doi:10.1147/sj.52.0078, with weights and without return"
    citation = Citation(
        key="belady1966study",
        title="A Study of Replacement Algorithms for a Virtual-Storage Computer",
        authors="Belady, L. A.",
        journal="IBM Systems Journal",
        volume="5",
        number="2",
        pages="78--101",
        year=1966,
        doi="10.1147/sj.52.0078",
    )
    proven = "every schedule of up to 7 tokens, and scipy's assignment"

    scope: Scope = parameter("kv_head", "kv_head: each head selects its own keys; layer: all retain the same")  # type: ignore[misc]

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.signals["schedule"].to(score.dtype)
