"""FastGen: a rule for each head, the cheapest that recovers what the head attended to in the prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import Policy, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation

PUNCTUATION, SPECIAL = 1, 2  # in the signal `token_kinds`
RULES = ("special", "punctuation", "frequent", "local", "full")  # each retains what those before it retain, and more


@policy("fastgen")
@dataclass(frozen=True)
class FastGen(Policy):
    """Retain the keys of one of five rules in each head: the first rule that recovers the attention of the prompt.

    The rules retain more and more keys: special tokens; also punctuation; also the most attended of the other keys, a
    share `frequent` of all keys so far; also the newest keys, a share `local`; every key. At the end of the prompt each
    head selects the first rule whose keys have at least `recover` of the attention mass of the prompt's rows, on
    average; the newest keys are then those of each row. The head follows this rule to the end. A key that the rule no
    longer retains is evicted; the current key too, once its query has attended. There is no budget: compare the policy
    with others that hold as many keys on average, which the summary shows.

    arXiv:2310.01801. Its full text was not available. The authors' repository, machilusZ/FastGen, has no code and
    refers to AnswerDotAI/cold-compress, whose ``KVCacheHybrid`` and ``fastgen.yaml`` were read: the five rules, the
    test, 0.3 and 0.3 are from there. Ours: shares are of the keys so far; there, of the longest text for which the
    cache has room. Keys are ordered by the sum of their weights; there, by a mean over 400 rows. A group decides from
    the mean of its query heads. No first keys are retained; there, four (``global_tokens``).

    Special tokens are those that the tokenizer marks as special; punctuation are tokens without letters and digits. A
    trace records which tokens are special (`special_tokens` in ``trace.json``); imported traces do not.

    Example
    -------
    Key 0 is special (2), key 2 punctuation (1). Together they have .85 of the mass of three rows, key 0 alone .75.

    >>> from kvscope.replay.example import held
    >>> rows, kinds = [[1], [0.7, 0.3], [0.55, 0.15, 0.3], [0.5, 0.1, 0.2, 0.2]], [2, 0, 1, 0]
    >>> held("fastgen:recover=0.8", rows, budget=4, prompt=3, token_kinds=kinds)
    [[0], [0, 1], [0, 2], [0, 2]]
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "token_kinds"})
    bounded: ClassVar[bool] = False
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "retain j by the head's rule: special, punctuation, most attended, newest, or every key"
    paper: ClassVar[str] = "arXiv:2310.01801; our reading of its abstract and of cold-compress"
    citation: ClassVar[Citation] = Citation(
        key="ge2023fastgen",
        title="Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
        authors="Ge, Suyu and Zhang, Yunan and Liu, Liyuan and Zhang, Minjia and Han, Jiawei and Gao, Jianfeng",
        year=2023,
        arxiv="2310.01801",
    )
    proven: ClassVar[str] = "paper"

    recover: float = parameter(0.95, "share of the attention mass of the prompt that a rule must retain")
    frequent: float = parameter(0.3, "most attended keys that are retained, as a share of the keys so far")
    local: float = parameter(0.3, "newest keys that are retained, as a share of the keys so far")

    def __post_init__(self) -> None:
        for name in ("recover", "frequent", "local"):
            at_least(name, getattr(self, name), 0, 1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        row = step.weights()
        total = score + row
        if step.t < step.prompt:
            self._add_older(step, row)
        if not step.compresses:
            return total
        if "rule" not in step.memory:
            step.memory["rule"] = self._rule(step, total)
        return torch.where(self._retained(step, total), total, -torch.inf)

    def _add_older(self, step: Step, row: Tensor) -> None:
        """Add to the sums ``[R, L, G, n]`` of the weights that rows give to keys that are not among their newest."""
        older = row * (torch.arange(step.t + 1, device=row.device) <= step.t - _share(self.local, step.prompt))
        before = step.memory.get("older")
        step.memory["older"] = older if before is None else functional.pad(before, (0, 1)) + older

    def _rule(self, step: Step, total: Tensor) -> Tensor:
        """Return the place in `RULES` of the rule of each head, ``[R, L, G, 1]``, at the end of the prompt."""
        older = step.memory.pop("older")
        kinds = step.signals["token_kinds"].expand(total.shape)
        named, recent = kinds >= PUNCTUATION, self._recent(step, total)
        frequent = named | self._frequent(total, ~named)
        beside = named | self._frequent(total, ~named & ~recent)
        mass = torch.stack(
            [
                (total * (kinds == SPECIAL)).sum(-1),
                (total * named).sum(-1),
                (total * frequent).sum(-1),
                (total - older * ~beside).sum(-1),
            ]
        )
        lacking: Tensor = mass / step.prompt < self.recover  # [4, R, L, G]
        return lacking.cumprod(0).sum(0)[..., None]

    def _retained(self, step: Step, total: Tensor) -> Tensor:
        """Return the keys that the rules of the heads retain, bool ``[R, L, G, n]``."""
        rule = step.memory["rule"]
        kinds = step.signals["token_kinds"].expand(total.shape)
        named, recent = kinds >= PUNCTUATION, self._recent(step, total) & (rule == RULES.index("local"))
        frequent = self._frequent(total, ~named & ~recent) & (rule >= RULES.index("frequent"))
        named = torch.where(rule == RULES.index("special"), kinds == SPECIAL, named)
        retained: Tensor = named | frequent | recent | (rule == RULES.index("full"))
        return retained

    def _recent(self, step: Step, total: Tensor) -> Tensor:
        return torch.arange(step.t + 1, device=total.device) > step.t - _share(self.local, step.t + 1)

    def _frequent(self, total: Tensor, among: Tensor) -> Tensor:
        """Return the keys of the largest sums among some, the newest of equal ones, bool ``[R, L, G, n]``."""
        n = total.shape[-1]
        newest_first = torch.where(among, total, -torch.inf).flip(-1).sort(dim=-1, descending=True, stable=True)
        largest = n - 1 - newest_first.indices[..., : _share(self.frequent, n)]
        return torch.zeros_like(among).scatter_(-1, largest, True) & among


def _share(share: float, keys: int) -> int:
    return math.ceil(share * keys)
