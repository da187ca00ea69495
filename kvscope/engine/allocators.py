"""The ways of sharing out a budget that papers use: uniform, pyramid, ada, cake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.engine.allocation import AllocationRequest, Allocator, allocator, apportion
from kvscope.policies.base import Step


@allocator("uniform")
class Uniform(Allocator):
    """Every layer and head holds the same number of keys."""

    def share(self, request: AllocationRequest) -> Tensor:
        size = (len(request.budget), len(request.layers), request.heads)
        return request.budget[:, None, None].expand(size).clone()


@allocator("pyramid")
class Pyramid(Allocator):
    """The first layers hold most, the last ones least, on a straight line.

    With ``b`` the free budget of a head, the line goes from ``2b - b // 20`` in the first layer to ``b // 20`` in the
    last; if the first would hold more than there is, it holds all of it and the last the rest. A prompt shorter than
    ``2b`` is shared out evenly. PyramidKV, arXiv:2406.02069, section 4.2; code Zefan-Cai/KVCache-Factory,
    ``PyramidKVCluster``. That code goes down by whole keys, so that layer ``l`` holds up to ``l`` keys more than the
    line; here the total is exact.
    """

    spans = "layers"
    paper = "arXiv:2406.02069 section 4.2"

    def share(self, request: AllocationRequest) -> Tensor:
        last, first = pyramid_ends(request.free, request.room)
        place = torch.arange(request.n_layers, device=request.budget.device).double() / max(request.n_layers - 1, 1)
        line = first[:, None] + (last - first)[:, None] * place  # [R, layers of the model]
        keys = apportion(request.free * request.n_layers, line) + request.fixed[:, None]
        even = (request.prompt <= request.budget) | (request.prompt < 2 * request.free) | (request.n_layers == 1)
        keys = torch.where(even[:, None], request.budget[:, None], keys)
        return keys[:, request.layers, None].expand(-1, -1, request.heads).clone()


def pyramid_ends(free: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Return the free keys of the last and of the first layer, int64 ``[R]`` each."""
    last = free // 20
    first = 2 * free - last
    too_much = first >= room
    first = torch.where(too_much, room, first)
    return torch.where(too_much, 2 * free - first, last), first


@allocator("ada")
class Ada(Allocator):
    """Heads of a layer whose scores are concentrated give keys to heads whose scores are spread.

    The best ``S * b`` scores of all heads of the layer are counted by head, with ``b`` the free budget of a head; a
    head holds its count times ``1 - f`` plus ``f * b``, with ``f = 0.2`` so that none starves. Ada-KV,
    arXiv:2407.11550, section 3.3; code FFY0/AdaKV. That code rounds ``f * b`` down and then each head by itself; here
    the rounding is shared, so that the total is exact, and no head is further than a key or two from that code's.
    """

    when = "prompt"
    spans = "heads"
    paper = "arXiv:2407.11550 section 3.3"
    floor = 0.2

    def share(self, request: AllocationRequest) -> Tensor:
        assert request.score is not None, "asked for at the end of the prompt"
        runs, layers, heads, n = request.score.shape
        free = request.free.clamp(min=0)
        wanted = (free * heads).clamp(max=heads * n)
        order = request.score.reshape(runs, layers, heads * n).argsort(dim=-1, descending=True, stable=True)
        best = torch.arange(heads * n, device=order.device) < wanted[:, None, None]
        count = torch.zeros((runs, layers, heads), dtype=torch.float64, device=order.device)
        count.scatter_add_(-1, order // n, best.to(torch.float64).expand(order.shape))
        wish = count * (1 - self.floor) + free.double()[:, None, None] * self.floor
        keys = apportion((free * heads)[:, None].expand(runs, layers), wish, request.room[:, None, None])
        keys = keys + request.fixed[:, None, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, request.budget[:, None, None], keys)


@allocator("cake")
class Cake(Allocator):
    """Layers whose attention is spread and changes from row to row hold more.

    Weight of a layer: ``entropy^(1/tau1) * variance^(1/tau2)`` of the last 32 rows of the prompt on the keys before
    them: ``-w ln w`` summed over rows and keys, and the variance of a key's weights over the rows, summed over keys;
    both averaged over heads. What a layer cannot use goes to the others. CAKE, arXiv:2503.12491, section 4.1; code
    antgroup/cakekv. The temperatures depend on the model there; ``tau1 = tau2 = 1`` here. That code cuts shares down to
    whole keys and hands out what is left in equal parts; here it goes by the weights.
    """

    when = "prompt"
    spans = "layers"
    needs = frozenset({"weights"})
    looks_across = True
    paper = "arXiv:2503.12491 section 4.1"
    window = 32

    def observe(self, step: Step, memory: dict[str, Any]) -> None:
        if step.t < step.prompt - self.window or step.prompt <= self.window:
            return
        assert step.live is not None, "the engine makes live rows for what an allocator needs"
        row = step.live[..., : step.prompt - self.window].double()
        entropy = -torch.special.xlogy(row, row).sum(-1)  # [R, L, H]
        for name, value in (("entropy", entropy), ("sum", row), ("squares", row * row), ("rows", 1)):
            memory[name] = memory.get(name, 0) + value

    def share(self, request: AllocationRequest) -> Tensor:
        assert len(request.layers) == request.n_layers, "all layers are stepped together"
        size = (len(request.budget), request.n_layers, request.heads)
        uniform = request.budget[:, None, None].expand(size)
        if "rows" not in request.memory:  # a prompt no longer than the window has nothing before it to look at
            return uniform.clone()
        memory, rows = request.memory, request.memory["rows"]
        variance = (memory["squares"] / rows - (memory["sum"] / rows) ** 2).clamp(min=0).sum(-1)
        weight = (memory["entropy"] / rows).mean(-1) * variance.mean(-1)  # [R, L]
        keys = apportion(request.free * request.n_layers, weight, request.room[:, None]) + request.fixed[:, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, uniform, keys[..., None].expand(size))
