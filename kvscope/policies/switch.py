"""Switch: one policy in some layers, another in the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy, Step, parameter, policy
from kvscope.policies.members import Members


@policy("switch")
@dataclass(frozen=True)
class Switch(Members):
    """Retain the keys of policy `a` in the given layers, and those of policy `b` in the others.

    Layers are counted from 0 among those of the model that have attention: ``layers=0-3``, or in parentheses
    ``layers=(0-1,6)``. If one of the two is ``full``, its layers hold every key, and the budget applies to each of the
    other layers, as in papers that do not compress the first layers. Otherwise the budget applies to all layers. In all
    layers the larger protection of both policies holds. This is our rule, without a paper or code; it is cited with
    the publications of its members.

    Both must evict at the same time and hold to a budget. Write ``switch(full, h2o, layers=0-1)`` or
    ``switch:a=streaming-llm,b=tova,layers=(0,2-3)``.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .2, .2], [.1, .2, .4, .3]]
    >>> held("switch(h2o(recent=0), tova, layers=0)", rows, budget=2)[-1]  # the first layer, so h2o
    [0, 1]
    >>> held("switch(h2o(recent=0), tova, layers=1)", rows, budget=2)[-1]
    [2, 3]
    """

    formula = "S[j] = S_a[j] in the layers that are named, S_b[j] in the others"
    paper = "combination of two policies"
    proven = "own rule"

    layers: str = parameter("0", "layers of the first policy: 0-3, or (0-1,6)")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", _written(self.places))

    @cached_property
    def places(self) -> frozenset[int]:
        """The layers of the first policy."""
        found: set[int] = set()
        for part in self.layers.strip("() ").split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise UsageError(f"switch: layers={self.layers} names no layers", "Write layers=0-3 or layers=(0-1,6).")
            found |= set(range(first, last + 1))
        return frozenset(found)

    def refusal(self, member: Policy) -> str | None:
        other = next(each for each in self.members if each is not member)
        if member.name == "full" and other.name != "full":
            return None
        return super().refusal(member)

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        if max(self.places) >= n_layers or len(self.places) == n_layers:
            raise UsageError(
                f"{self.label} needs layers of both policies, and the model has layers 0 to {n_layers - 1}",
                f"Name some of them: layers=0-{max(n_layers // 2 - 1, 0)}",
            )
        super().fit(layers, kv_heads, n_layers)

    def whole(self, place: int) -> bool:
        return self.members[0 if place in self.places else 1].name == "full"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        one, other = self.scores(step, score.dtype)
        if "first" not in step.memory:
            named = [place in self.places for place in step.places]
            step.memory["first"] = torch.tensor(named, device=score.device)[:, None, None]  # [L, 1, 1]
        return torch.where(step.memory["first"], one, other)


def _written(places: frozenset[int]) -> str:
    """Return layers in their shortest form: ``0-3``, ``(0-1,6)``."""
    parts: list[list[int]] = []
    for place in sorted(places):
        if parts and parts[-1][-1] == place - 1:
            parts[-1].append(place)
        else:
            parts.append([place])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"({text})" if "," in text else text
