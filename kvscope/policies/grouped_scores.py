"""Scores of grouped heads: whether the rows of a group's query heads are reduced to one, or what each has summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kvscope.policies.recurrence import Recurrence
from kvscope.policies.step import GroupReduction, Step

Reduce = Literal["scores", "rows"]
Add = Callable[[Tensor, Tensor], Tensor]

GROUP_HELP = "how the query heads of a group are reduced to one: mean, max or sum"
REDUCE_HELP = "what is reduced over a group's heads: the scores, or each row before it is scored"


def accumulated(
    step: Step, score: Tensor, group: GroupReduction, reduce: Reduce, add: Add, rows: Tensor | None = None
) -> Tensor:
    """Return the scores of groups after a step for a rule that is linear in its rows, ``[R, L, G, n]``.

    Of a mean or a sum the order changes nothing but the rounding, so each row is then reduced, whatever `reduce` is.

    Parameters
    ----------
    step : Step
        The step that is completed.
    score : Tensor
        ``[R, L, G, n]``: what this function returned at the previous step.
    group, reduce : str
        The parameters of the policy.
    add : callable
        ``add(weights, score)`` returns the scores after the step; it is linear in both, with factors that do not differ
        among the heads of a group.
    rows : Tensor, optional
        ``[R, L, H, n]``, a row of each query head; the live row if omitted.
    """
    rows = step.head_weights() if rows is None else rows
    if reduce == "rows" or group != "max":
        return add(step.grouped(rows, group).to(score.dtype), score)
    of_heads = head_scores(step, score)
    of_heads.copy_(step.rounded(add(rows.to(score.dtype), of_heads)))
    return step.grouped(of_heads, group)


def recurrence_of_rows(group: GroupReduction, reduce: Reduce, decay: float) -> Recurrence | None:
    """Return the recurrence ``w_t + decay * score`` of such a rule, or None if it needs the scores of query heads."""
    return Recurrence(group, decay=decay) if reduce == "rows" or group != "max" else None


def head_scores(step: Step, score: Tensor) -> Tensor:
    """Return the scores of the query heads that a policy stores between steps, ``[R, L, H, n]``, to be written to.

    They are zero for a new key, and in the type of `score`, the policy's scores of groups.
    """
    if "head_scores" not in step.memory:
        heads = step.head_weights().shape[2]
        step.memory["head_scores"] = score.new_zeros((*score.shape[:2], heads, step.length))
    stored: Tensor = step.memory["head_scores"]
    return stored[..., : step.t + 1]
