"""The gate module: beside each attention layer, a small attention that decides which keys are evicted.

Source: arXiv:2410.12876, of which abstract, introduction and reviews were available; there is no public code. Choices
that these do not determine are marked "Ours".
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
from kvscope.core.output import replace_file
from kvscope.gates.file import AGAIN, WEIGHTS, GateFacts, path_of, read_facts, require_tensors
from kvscope.gates.sealed_file import same_weights

OPEN = 1.0  # initial bias, so that untrained gates retain most keys


class LayerGate(nn.Module):
    """The gates of one layer: ``g = sigmoid(W A(X) + b)``, one value for every key and key/value head.

    ``A`` is a small multi-head attention over the layer input ``X``. Ours: each token of ``X`` is first scaled to a
    mean square of one; ``A`` has no positional encoding; and the value of the token itself is added to the attention
    output, since without positions a gate could not find its token.
    """

    def __init__(self, facts: GateFacts) -> None:
        super().__init__()
        self._facts = facts
        self.project = nn.Linear(facts.hidden, 3 * facts.heads * facts.size, bias=False)
        self.open = nn.Linear(facts.heads * facts.size, facts.kv_heads)
        nn.init.constant_(self.open.bias, OPEN)

    def forward(self, hidden: Tensor, prompt: int) -> Tensor:
        """Return logits ``[batch, G, T]`` from layer inputs ``[batch, T, hidden]``, in the dtype of the inputs.

        The first `prompt` tokens attend to each other if the gate is bidirectional; all others attend causally.
        """
        batch, length, _ = hidden.shape
        projected = functional.linear(_normalised(hidden), self.project.weight.to(hidden))
        parts = projected.view(batch, length, 3, self._facts.heads, self._facts.size).permute(2, 0, 3, 1, 4)
        query, key, value = parts  # [batch, heads, T, size]
        first = min(prompt, length) if self._facts.form == "bidirectional" else 0
        seen = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        seen[:first, :first].fill_(True)
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen) + value
        together = found.transpose(1, 2).flatten(2)  # [batch, T, heads * size]
        return functional.linear(together, self.open.weight.to(hidden), self.open.bias.to(hidden)).transpose(1, 2)


class LearnedGate(nn.Module):
    """The gates of all layers of a model.

    Parameters
    ----------
    facts : GateFacts
        Facts about the gate, with its sizes.
    weights : Tensor
        Sample of the weights of its model (`kvscope.model.sample`).
    """

    def __init__(self, facts: GateFacts, weights: Tensor) -> None:
        super().__init__()
        self.facts = facts
        self.layers = nn.ModuleList(LayerGate(facts) for _ in range(facts.layers))
        self.register_buffer(WEIGHTS, weights)

    def values(self, layer: int, hidden: Tensor, prompt: int) -> Tensor:
        """Return the gate values of a layer, 0 to 1, ``[batch, G, T]``; first tokens in `sinks` have 1.

        Parameters
        ----------
        layer : int
            Number of the layer.
        hidden : Tensor
            Layer input ``[batch, T, hidden]``, float32 or float64.
        prompt : int
            ``P``, used by a bidirectional gate.
        """
        values = torch.sigmoid(self.layers[layer](hidden, prompt))
        sink = torch.arange(hidden.shape[1], device=hidden.device) < self.facts.sinks
        return torch.where(sink, 1.0, values)

    def margins(self, layer: int, hidden: Tensor, prompt: int) -> Tensor:
        """Return gate value minus threshold, ``[batch, G, T]``; a key is evicted where that is not above zero."""
        return self.values(layer, hidden, prompt) - self.facts.tau

    def require(self, name: str, *, layers: int, hidden: int, kv_heads: int, weights: Sequence[float]) -> None:
        """Raise UsageError unless the gate called `name` was trained for the model of these sizes and weights."""
        trained, given = (self.facts.layers, self.facts.hidden, self.facts.kv_heads), (layers, hidden, kv_heads)
        todo = "Train one for this model: kvscope gate train --model MODEL --text FILE"
        if trained != given:
            raise UsageError(
                "gate {} is for {}: {} layers, hidden size {}, {} key/value heads; the model has {}, {}, {}".format(
                    name, self.facts.model, *trained, *given
                ),
                todo,
            )
        known, found = self.get_buffer(WEIGHTS).cpu(), torch.tensor(weights)
        if not same_weights(known, found):
            raise UsageError(f"gate {name} is for {self.facts.model}, and this model has other weights", todo)

    def write(self, path: Path) -> None:
        """Write the gate to `path`, its parameters in float16; an existing file is replaced atomically."""
        tensors = {
            key: value.detach().cpu().to(torch.float32 if key == WEIGHTS else torch.float16).contiguous()
            for key, value in self.state_dict().items()
        }
        replace_file(path, save(tensors, self.facts.metadata(tensors)))


def load_gate(name: str) -> LearnedGate:
    """Return the gate of a file, or ``demo``; cached until the file changes.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file is not a gate, or damaged.
    """
    path = path_of(name)
    status = path.stat()
    return _loaded(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> LearnedGate:
    facts = read_facts(str(path))
    try:
        tensors = load_file(path)
        require_tensors(path, tensors)
        gate = LearnedGate(facts, tensors[WEIGHTS])
        gate.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"gate {path} is damaged: its parameters do not match its metadata", AGAIN) from error
    return gate.requires_grad_(False).eval()


def _normalised(hidden: Tensor) -> Tensor:
    """Return tokens scaled to a mean square of one; a token of zeros remains zero."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + torch.finfo(hidden.dtype).tiny)
