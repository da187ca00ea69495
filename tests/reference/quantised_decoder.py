"""Decoding token by token with a cache of integer codes: a model is asked for one token after the other.

Nothing of the closed loop or of its decoder is used, but the hook into the model's attention. Policies decide with sets
and loops (`tests.reference.replay`), and each head's cache is a `tests.reference.quantisation.Head`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvscope.core.cache_scheme import CacheScheme
from kvscope.model.attention_hook import Call, replace_attention
from kvscope.model.derotation import Derotation
from tests.reference.quantisation import Head, Vector

POLICIES = ("full", "h2o", "tova", "streaming-llm")


class Layer:
    """The caches of one layer's key/value heads, and the scores by which a policy evicts."""

    def __init__(self, scheme: CacheScheme, turn: Derotation | None, policy: str, budget: int) -> None:
        def turned(how: str) -> Any:
            def apply(key: Vector, position: int) -> Vector:
                assert turn is not None
                given = torch.tensor(key, dtype=torch.float64)[None, None, None]
                found: Vector = getattr(turn, how)(given, torch.tensor([position]))[0, 0, 0].tolist()
                return found

            return apply

        self.new: Callable[[], Any] = lambda: Head(scheme, turned("off"), turned("on"))
        self.policy, self.budget = policy, budget
        self.heads: list[Any] = []
        self.score: list[dict[int, float]] = []
        self.bits: list[int] = []

    def add(self, call: Call, position: int, place: int) -> None:
        groups = call.key.shape[1]
        if not self.heads:
            self.heads, self.score = [self.new() for _ in range(groups)], [{} for _ in range(groups)]
        for group, head in enumerate(self.heads):
            head.add(position, call.key[0, group, place].tolist(), call.value[0, group, place].tolist())

    def attend(self, call: Call, place: int, position: int) -> Tensor:
        """Return the output ``[H, D]`` of a query over what is held, and let the policy see its rows."""
        queries, share = call.query[0, :, place], call.query.shape[1] // len(self.heads)
        outputs, rows = [], []
        for number, query in enumerate(queries.tolist()):
            head = self.heads[number // share]
            logits = {
                at: sum(map(math.prod, zip(query, key, strict=True))) * call.scaling
                for at, key in head.key.items()
                if at <= position
            }
            peak = max(logits.values())
            weight = {at: math.exp(one - peak) for at, one in logits.items()}
            row = {at: one / sum(weight.values()) for at, one in weight.items()}
            rows.append(row)
            size = len(head.value[position])
            outputs.append([sum(row[at] * head.value[at][channel] for at in row) for channel in range(size)])
        self._observe(rows, share)
        return torch.tensor(outputs, dtype=torch.float64)

    def finish(self, tokens: int) -> None:
        """Evict, count and quantise once so many tokens have come."""
        for group, head in enumerate(self.heads):
            head.keep(self.retained(group, tokens - 1))
        self.bits.append(sum(head.bits for head in self.heads))
        for head in self.heads:
            head.quantise(tokens)

    def retained(self, group: int, position: int) -> set[int]:
        """Return what a head holds after a step that keeps to the budget."""
        score, held = self.score[group], set(self.heads[group].key)
        recent = self.budget // 2 if self.policy == "h2o" else 0
        protected = {at for at in held if at > position - recent}
        if self.policy == "streaming-llm":
            score = {at: float(at) for at in held}
            protected |= {at for at in held if at < 2}
        while self.policy != "full" and len(held) > self.budget:
            held.remove(min(sorted(held - protected), key=lambda at: score[at]))
        return held

    def _observe(self, rows: list[dict[int, float]], share: int) -> None:
        for group, score in enumerate(self.score):
            own = rows if self.policy == "tova" else rows[group * share : (group + 1) * share]
            for at in own[0]:
                mean = sum(row.get(at, 0.0) for row in own) / len(own)
                score[at] = mean + (score.get(at, 0.0) if self.policy == "h2o" else 0.0)


def decode(
    model: Any,
    ids: Tensor,
    scheme: CacheScheme,
    policy: str,
    budget: int,
    prompt: int,
    prefill: str,
    turns: Mapping[int, Derotation],
) -> tuple[Tensor, list[Layer]]:
    """Return the logits ``[T, V]`` of a text ``[T]`` and the layers' caches, after all of it."""
    return decode_with(model, ids, lambda call: Layer(scheme, turns.get(call.layer), policy, budget), prompt, prefill)


def decode_with(
    model: Any, ids: Tensor, new: Callable[[Call], Layer], prompt: int, prefill: str
) -> tuple[Tensor, list[Layer]]:
    """Return the same, with caches that `new` makes for the first call of a layer."""
    layers: dict[int, Layer] = {}
    logits: list[Tensor] = []

    def layer_of(call: Call) -> Layer:
        if call.layer not in layers:
            layers[call.layer] = new(call)
        return layers[call.layer]

    def read(call: Call, kernel: Any) -> Tensor:
        for position in range(prompt):
            layer_of(call).add(call, position, position)
        for position in range(prompt):  # the rows of the whole prompt, each over the keys before it
            layer_of(call).attend(call, position, position)
        output: Tensor = kernel()
        return output

    def step(call: Call, kernel: Any) -> Tensor:
        layer_of(call).add(call, t, 0)
        return layer_of(call).attend(call, 0, t)[None, None].to(call.query.dtype)

    def finish(tokens: int) -> None:
        for layer in layers.values():
            layer.finish(tokens)

    start = prompt if prefill == "full" else 0
    if start:
        with replace_attention(model, read):
            logits.append(model(input_ids=ids[None, :prompt], use_cache=False).logits[0])
        finish(prompt)
    for t in range(start, len(ids)):
        with replace_attention(model, step):
            out = model(input_ids=ids[None, t : t + 1], position_ids=torch.tensor([[t]]), use_cache=False)
        logits.append(out.logits[0])
        finish(t + 1)
    return torch.cat(logits), [layers[number] for number in sorted(layers)]
