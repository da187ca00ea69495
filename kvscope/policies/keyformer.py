"""Keyformer: key tokens of the prompt, chosen by noisy attention, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Step,
    at_least,
    compute_once_if_shared,
    parameter,
    policy,
)
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce, accumulated


@policy("keyformer")
@dataclass(frozen=True)
class Keyformer(Policy):
    """Retain the keys with the largest sum of noisy attention over the prompt, and the newest ones.

    ``S[j] = sum_t softmax_j((x_t[j] + g_t[j]) / tau)`` with logits ``x`` and Gumbel noise ``g``, drawn from `seed` for
    each query head, step and key; ``tau = tau_init + tau_delta * i`` at decoding step ``i`` (0 in the prompt). The
    newest ``int(recent_ratio * B)`` keys are protected. arXiv:2403.09054; code d-matrix-ai/keyformer-llm, GPT-J.

    As in that code, the key tokens are selected once, when the first key is evicted; every later key is evicted when it
    leaves the recent window. In that code the budget counts the keys that a query sees, the current one included. Here,
    as for `h2o`, it counts the keys held after the step, so a query sees one key more, which has just left the window.
    The retained keys are the same. The code has no grouped heads; here `group` reduces the scores of a group's heads,
    or with ``reduce=rows`` each noisy row. The code's budget is 60 % of the prompt; here the user chooses it. A budget
    under 4 has no recent window; the code then evicts nothing.

    Example: at a very high temperature all weights are equal, and an older key has a larger sum. Budget 4,
    ``recent_ratio=0.5``, prompt 4: keys 0 and 1 are the key tokens, and later keys are retained while they are recent.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0 / n] * n for n in range(1, 7)]
    >>> held(Keyformer(tau_init=1e6, recent_ratio=0.5), rows, budget=4, prompt=4)
    [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 5]]
    """

    prefills = frozenset({"full"})
    formula = "S[j] = sum over t of softmax((x_t + g_t) / tau)[j], with Gumbel noise g"
    paper = "arXiv:2403.09054"
    citation = Citation(
        key="adnan2024keyformer",
        title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
        authors=(
            "Adnan, Muhammad and Arunkumar, Akhil and Jain, Gaurav and Nair, Prashant J. and Soloveychik, Ilya and "
            "Kamath, Purushotham"
        ),
        booktitle="Proceedings of Machine Learning and Systems",
        year=2024,
        arxiv="2403.09054",
    )
    proven = "authors' decisions"

    recent_ratio: float = parameter(0.3, "share of the budget for the newest keys")
    tau_init: float = parameter(1.0, "temperature in the prompt")
    tau_delta: float = parameter(0.01, "growth of the temperature at each decoding step")
    seed: int = parameter(0, "seed of the noise")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("scores", REDUCE_HELP)

    def __post_init__(self) -> None:
        at_least("recent_ratio", self.recent_ratio, 0, 1)
        at_least("tau_init", self.tau_init, 1e-6)
        at_least("tau_delta", self.tau_delta, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=int(self.recent_ratio * budget))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        chosen = step.memory.get("keyformer", torch.zeros_like(step.budget, dtype=torch.bool))  # [R, L, G]
        if step.compresses:
            step.memory["keyformer"] = chosen | (step.visible.sum(-1) > step.budget)
        assert step.live is not None
        noisy = compute_once_if_shared(step.live, lambda live: self._noisy(step, live))
        total = accumulated(step, score, self.group, self.reduce, lambda rows, score: score + rows, rows=noisy)
        age = torch.arange(step.t, -1, -1, device=score.device, dtype=score.dtype)
        # Once chosen, the newest key beyond the recent window is the one that has just left it.
        return torch.where(chosen[..., None], age, total)

    def _noisy(self, step: Step, live: Tensor) -> Tensor:
        """Return the softmax of the logits with Gumbel noise, ``[R, L, H, n]``; a row without mass stays zero."""
        noise = -torch.log(-torch.log(step.draw_row(self.seed)))
        tau = self.tau_init + self.tau_delta * max(step.t - step.prompt + 1, 0)
        logits = live.double().log()  # up to a constant per row, which no softmax sees
        return torch.softmax((logits + noise) / tau, -1).nan_to_num(0.0)
