"""The published rules of budget allocation: uniform, pyramid, ada, cake, heads, decay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvscope.engine.allocation import AllocationRequest, Allocator, allocator, among_layers, apportion
from kvscope.policies.base import Step


@allocator("uniform")
class Uniform(Allocator):
    """Every layer and head holds the same number of keys."""

    def share(self, request: AllocationRequest) -> Tensor:
        size = (len(request.budget), len(request.layers), request.heads)
        return request.budget[:, None, None].expand(size).clone()


@allocator("pyramid")
class Pyramid(Allocator):
    """The number of keys falls linearly from the first layer to the last.

    With ``b`` the free budget of a head, the line goes from ``2b - b // 20`` in the first layer to ``b // 20`` in the
    last. If the first layer would get more keys than the prompt has, it gets all of them and the last layer the rest of
    ``2b``. With a prompt shorter than ``2b`` the allocation is uniform. PyramidKV, arXiv:2406.02069, section 4.2; code
    Zefan-Cai/KVCache-Factory, ``PyramidKVCluster``. That code decreases by whole keys, so that layer ``l`` holds up to
    ``l`` keys more than the line; here the total is exact. Where layers have different numbers of heads, the line is
    that of a head, scaled to the total.
    """

    spans = "layers"
    paper = "arXiv:2406.02069 section 4.2"

    def share(self, request: AllocationRequest) -> Tensor:
        last, first = pyramid_ends(request.free, request.room)
        depth = torch.arange(request.n_layers, device=request.budget.device).double() / max(request.n_layers - 1, 1)
        line = first[:, None] + (last - first)[:, None] * depth  # [R, layers of the model]
        keys = among_layers(request, line) + request.fixed[:, None, None]  # [R, layers of the model, S]
        uniform = (request.prompt <= request.budget) | (request.prompt < 2 * request.free) | (request.n_layers == 1)
        keys = torch.where(uniform[:, None, None], request.budget[:, None, None], keys)
        return keys[:, request.layers]


def pyramid_ends(free: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Return the free keys of the last and of the first layer, int64 ``[R]`` each."""
    last = free // 20
    first = 2 * free - last
    too_much = first >= room
    first = torch.where(too_much, room, first)
    return torch.where(too_much, 2 * free - first, last), first


@allocator("ada")
class Ada(Allocator):
    """Heads with concentrated scores give keys to heads of the same layer with spread scores.

    With ``b`` the free budget of a head, the ``S * b`` highest scores of the layer are counted per head. A head gets
    ``1 - f`` times its count plus ``f * b``; ``f = 0.2`` guarantees every head a minimum. Ada-KV, arXiv:2407.11550,
    section 3.3; code FFY0/AdaKV. That code rounds ``f * b`` down and then rounds each head separately; here the heads
    are rounded jointly, so that the total is exact. The two differ by a key or two per head at most.
    """

    when = "prompt"
    spans = "heads"
    paper = "arXiv:2407.11550 section 3.3"
    floor = 0.2

    def share(self, request: AllocationRequest) -> Tensor:
        assert request.score is not None, "called at the end of the prompt"
        runs, layers, heads, n = request.score.shape
        free = request.free.clamp(min=0)
        top = (free * heads).clamp(max=heads * n)
        order = request.score.reshape(runs, layers, heads * n).argsort(dim=-1, descending=True, stable=True)
        best = torch.arange(heads * n, device=order.device) < top[:, None, None]
        count = torch.zeros((runs, layers, heads), dtype=torch.float64, device=order.device)
        count.scatter_add_(-1, order // n, best.to(torch.float64).expand(order.shape))
        weights = count * (1 - self.floor) + free.double()[:, None, None] * self.floor
        keys = apportion((free * heads)[:, None].expand(runs, layers), weights, request.room[:, None, None])
        keys = keys + request.fixed[:, None, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, request.budget[:, None, None], keys)


@allocator("cake")
class Cake(Allocator):
    """Layers whose attention is spread, and changes from row to row, hold more keys.

    A layer's weight is ``entropy^(1/tau1) * variance^(1/tau2)``, computed from the last 32 rows of the prompt on the
    keys before them. The entropy is ``-w ln w`` summed over rows and keys, the variance is that of a key's weights over
    the rows, summed over keys; both are averaged over heads. Keys that a layer cannot use go to the other layers. CAKE,
    arXiv:2503.12491, section 4.1; code antgroup/cakekv. There the temperatures depend on the model; here
    ``tau1 = tau2 = 1``. That code rounds shares down and gives the remainder out in equal parts; here the remainder is
    allocated in proportion to the weights.
    """

    when = "prompt"
    spans = "layers"
    needs = frozenset({"weights"})
    looks_across = True
    paper = "arXiv:2503.12491 section 4.1"
    window = 32

    def observe(self, step: Step, memory: dict[str, Tensor]) -> None:
        if step.t < step.prompt - self.window or step.prompt <= self.window:
            return
        assert step.live is not None, "needs contains weights"
        row = step.live[..., : step.prompt - self.window].double()
        entropy = -torch.special.xlogy(row, row).sum(-1)  # [R, L, H]
        for name, value in (("entropy", entropy), ("sum", row), ("squares", row * row)):
            memory[name] = memory[name] + value if name in memory else value

    def condensed(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = self.window
        if not memory or "weight" in memory:
            return memory
        variance = (memory["squares"] / rows - (memory["sum"] / rows) ** 2).clamp(min=0).sum(-1)
        return {"weight": (memory["entropy"] / rows).mean(-1) * variance.mean(-1)}  # [R, L]

    def share(self, request: AllocationRequest) -> Tensor:
        assert len(request.layers) == request.n_layers, "all layers are stepped together"
        size = (len(request.budget), request.n_layers, request.heads)
        uniform = request.budget[:, None, None].expand(size)
        if not request.memory:  # the prompt is no longer than the window, so there are no keys before the window
            return uniform.clone()
        weight = self.condensed(request.memory)["weight"]
        keys = among_layers(request, weight, request.room[:, None]) + request.fixed[:, None, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, uniform, keys)


@allocator("heads")
class Heads(Allocator):
    """Heads that attend to keys from far back hold more keys, those of all layers compared.

    With ``b`` the free budget of a head, each head keeps ``b - b // beta`` keys, and the others are shared by all heads
    of the model in proportion to their scores. A head's score is the weight that the last 32 rows of the prompt give to
    keys that are neither among the first 4 nor among the 16 newest before their query, averaged over rows and the
    query heads of a group; a policy with scores from a file, such as ``headkv``, uses those. HeadKV, arXiv:2410.19258;
    code FYYFU/HeadKV, ``ReasonSnapKVCluster``, with ``beta = 1.2`` of its scripts. Scores made of the
    prompt are ours; that code rounds each head by itself, here the total is exact. Keys that a head cannot use go to
    the other heads. In layers with different numbers of heads, those of a layer have the mean of its scores.
    """

    when = "prompt"
    spans = "heads"
    needs = frozenset({"weights"})
    looks_across = True
    paper = "arXiv:2410.19258"
    rows, sinks, newest, beta = 32, 4, 16, 1.2

    def observe(self, step: Step, memory: dict[str, Tensor]) -> None:
        runs = len(step.visible)
        if "beta" in step.memory:  # of the policy
            memory["beta"] = step.memory["beta"].expand(runs, len(step.layers))
        if "head_scores" in step.memory:
            memory["scores"] = step.memory["head_scores"].expand(runs, -1, -1)
            return
        if step.t < step.prompt - self.rows:
            return
        key = torch.arange(step.t + 1, device=step.visible.device)
        far = (key >= self.sinks) & (key <= step.t - self.newest)
        mass = (step.weights().double() * far).sum(-1)  # [R, L, G]
        memory["scores"] = memory["scores"] + mass if "scores" in memory else mass

    def condensed(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value if value.ndim == 2 else value.mean(-1) for name, value in memory.items()}

    def share(self, request: AllocationRequest) -> Tensor:
        assert len(request.layers) == request.n_layers, "all layers are stepped together"
        scores = request.memory["scores"].double()
        scores = scores if scores.ndim == 3 else scores[..., None].expand(-1, -1, request.heads)  # [R, L, S]
        free = request.free.clamp(min=0)
        pool = (free / self._beta(request)).floor()[:, None, None]  # [R, 1, 1]
        wish = (free[:, None, None] - pool) + pool * _relative(scores, request.kv_heads_of)
        if request.kv_heads_of is None:
            total = free * wish[0].numel()
            keys = apportion(total, wish.flatten(1), request.room[:, None]).view(wish.shape)
        else:
            keys = among_layers(request, wish.mean(-1), request.room[:, None])
        keys = keys + request.fixed[:, None, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, request.budget[:, None, None], keys)

    def _beta(self, request: AllocationRequest) -> Tensor | float:
        return request.memory["beta"][:, 0] if "beta" in request.memory else self.beta


def _relative(scores: Tensor, kv_heads_of: Tensor | None) -> Tensor:
    """Return scores ``[R, L, S]`` divided by their mean over the heads of the model; ones if all are zero."""
    heads = torch.ones_like(scores[0, :, 0]) if kv_heads_of is None else kv_heads_of.double()
    mean = (scores.mean(-1) * heads).sum(-1) / heads.sum()  # [R]
    return torch.where(mean[:, None, None] > 0, scores / mean[:, None, None], 1.0)


@allocator("decay")
class Decay(Allocator):
    """The number of keys falls from layer to layer by a factor that itself falls along a cosine.

    With ``L`` layers, layer ``l`` keeps ``r_l = d + (1 - d) (cos(pi l / L) + 1) / 2`` of the free keys of the layer
    before it, ``d = 0.9``; the shares are in proportion to these products. PyramidInfer, arXiv:2405.12532;
    code mutonix/pyramidinfer, ``modeling_llama_pyramidinfer.py``, whose first layer keeps ``r_0 = 1`` of the prompt:
    there the factors give the budget, here they divide it. Keys that a layer cannot use go to the other layers.
    """

    spans = "layers"
    paper = "arXiv:2405.12532"
    least = 0.9

    def share(self, request: AllocationRequest) -> Tensor:
        device, count = request.budget.device, request.n_layers
        bends = [(math.cos(math.pi * layer / count) + 1) / 2 for layer in range(count)]
        kept = torch.tensor(
            [self.least + (1 - self.least) * bend for bend in bends], dtype=torch.float64, device=device
        )
        weights = kept.cumprod(0).expand(len(request.budget), count)
        keys = among_layers(request, weights, request.room[:, None]) + request.fixed[:, None, None]
        fits = (request.budget >= request.prompt)[:, None, None]
        return torch.where(fits, request.budget[:, None, None], keys)[:, request.layers]
