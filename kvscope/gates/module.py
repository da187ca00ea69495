"""The gate itself: in front of each attention layer, a small attention that opens or shuts a gate for every key.

What is known of the paper (arXiv:2410.12876) is its abstract, its introduction and its reviews; there is no public
code. What they leave open is our choice, and marked so here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from kvscope.core.errors import ModelError, UsageError
from kvscope.gates.file import AGAIN, WEIGHTS, GateFacts, path_of, read_facts

OPEN = 1.0  # bias at the start: gates begin open
SAME = 0.01  # relative difference of weights that rounding to 16 bit may cause, with room


class LayerGate(nn.Module):
    """The gates of one layer: ``g = sigmoid(W A(X) + b)``, one for every key and key/value head.

    ``A`` is a reduced multi-head attention over the layer's input ``X``, whose tokens are first scaled to a mean square
    of one. Ours: it has no positions, and a token's own value is added to what it attends to, so that a gate need not
    find its own token again.
    """

    def __init__(self, facts: GateFacts) -> None:
        super().__init__()
        self._facts = facts
        self.project = nn.Linear(facts.hidden, 3 * facts.heads * facts.size, bias=False)
        self.open = nn.Linear(facts.heads * facts.size, facts.kv_heads)
        nn.init.constant_(self.open.bias, OPEN)

    def forward(self, hidden: Tensor, prompt: int) -> Tensor:
        """Return logits ``[batch, G, T]`` from inputs ``[batch, T, hidden]``, in their precision.

        `prompt` says how many tokens look at each other, if the gate is bidirectional; all others look back.
        """
        batch, length, _ = hidden.shape
        projected = functional.linear(_even(hidden), self.project.weight.to(hidden))
        parts = projected.view(batch, length, 3, self._facts.heads, self._facts.size).permute(2, 0, 3, 1, 4)
        query, key, value = parts  # [batch, heads, T, size]
        first = min(prompt, length) if self._facts.form == "bidirectional" else 0
        seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        seen[:first, :first] = True
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen) + value
        together = found.transpose(1, 2).flatten(2)  # [batch, T, heads * size]
        return functional.linear(together, self.open.weight.to(hidden), self.open.bias.to(hidden)).transpose(1, 2)


class LearnedGate(nn.Module):
    """The gates of all layers of a model.

    Parameters
    ----------
    facts : GateFacts
        Sizes, and the rest of what it is.
    weights : Tensor
        `sample` of the model that it belongs to.
    """

    def __init__(self, facts: GateFacts, weights: Tensor) -> None:
        super().__init__()
        self.facts = facts
        self.layers = nn.ModuleList(LayerGate(facts) for _ in range(facts.layers))
        self.register_buffer(WEIGHTS, weights)

    def values(self, layer: int, hidden: Tensor, prompt: int) -> Tensor:
        """Return how open the gates of a layer are, 0 to 1, ``[batch, G, T]``.

        Parameters
        ----------
        layer : int
            Number of the layer.
        hidden : Tensor
            Its input, ``[batch, T, hidden]``; float32 or better.
        prompt : int
            ``P``, for a bidirectional gate.
        """
        opened = torch.sigmoid(self.layers[layer](hidden, prompt))
        first = torch.arange(hidden.shape[1], device=hidden.device) < self.facts.sinks
        return torch.where(first, 1.0, opened)

    def margins(self, layer: int, hidden: Tensor, prompt: int) -> Tensor:
        """Return by how much each gate is above its threshold; where that is not above zero, the key is evicted."""
        return self.values(layer, hidden, prompt) - self.facts.tau

    def require(self, name: str, *, layers: int, hidden: int, kv_heads: int, weights: Sequence[float]) -> None:
        """Raise UsageError unless the gate called `name` was trained for the model of these sizes and weights."""
        own, others = (self.facts.layers, self.facts.hidden, self.facts.kv_heads), (layers, hidden, kv_heads)
        todo = "Train one for this model: kvscope gate train --model MODEL --text FILE"
        if own != others:
            raise UsageError(
                "gate {} is for {}: {} layers, hidden size {}, {} key/value heads; the model has {}, {}, {}".format(
                    name, self.facts.model, *own, *others
                ),
                todo,
            )
        mine, given = self.get_buffer(WEIGHTS).cpu(), torch.tensor(weights)
        if mine.shape != given.shape or bool((mine - given).abs().gt(SAME * (mine.abs() + mine.abs().mean())).any()):
            raise UsageError(f"gate {name} is for {self.facts.model}, and the weights of this model are others", todo)

    def write(self, path: Path) -> None:
        """Write the gate, its parameters in 16 bit; what is there is replaced in one step."""
        tensors = {
            key: value.detach().cpu().to(torch.float32 if key == WEIGHTS else torch.float16).contiguous()
            for key, value in self.state_dict().items()
        }
        unfinished = path.with_name(path.name + ".incomplete")
        unfinished.write_bytes(save(tensors, self.facts.metadata()))
        unfinished.replace(path)


def load_gate(name: str) -> LearnedGate:
    """Return the gate of a file, or ``demo``; as long as the file does not change, the same object.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If it is no gate, or damaged.
    """
    path = path_of(name)
    facts = path.stat()
    return _loaded(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> LearnedGate:
    facts = read_facts(str(path))
    try:
        tensors = load_file(path)
        gate = LearnedGate(facts, tensors[WEIGHTS])
        gate.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"gate {path} is damaged: its parameters do not fit what it says of itself", AGAIN) from error
    return gate.requires_grad_(False).eval()


def _even(hidden: Tensor) -> Tensor:
    """Return tokens scaled to a mean square of one; a token of zeros stays zero."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + torch.finfo(hidden.dtype).tiny)
