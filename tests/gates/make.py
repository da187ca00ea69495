"""Random gates for tiny models that evict about half of the keys, and the plain-loop reference of a gate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.gates.file import GateFacts
from kvscope.gates.module import LayerGate, LearnedGate
from kvscope.model.sample import sample


def facts(model: Any, **more: Any) -> GateFacts:
    """Return the facts of a gate for a model."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    given = {"heads": 2, "size": 4, **more}
    return GateFacts(type(model).__name__, config.num_hidden_layers, config.hidden_size, heads, **given)


def gate(model: Any, seed: int = 0, **more: Any) -> LearnedGate:
    """Return a gate with random parameters, far enough from the threshold for rounding not to matter."""
    torch.manual_seed(seed)
    made = LearnedGate(facts(model, **more), torch.tensor(sample(model)))
    for layer in made.layers:
        assert isinstance(layer, LayerGate)
        layer.open.weight.data.mul_(6)
        layer.open.bias.data.zero_()
    return made.requires_grad_(False)


def written(folder: Path, model: Any, **more: Any) -> str:
    """Return the path of a file with such a gate."""
    path = folder / f"{'-'.join(['gate', *map(str, more.values())])}.safetensors"
    gate(model, **more).write(path)
    return str(path)


def opened(layer: LayerGate, hidden: NDArray[Any], form: str, prompt: int) -> NDArray[Any]:
    """Return ``g`` of one sequence, ``[G, T]``, token by token and head by head."""
    heads, size = layer._facts.heads, layer._facts.size
    project, weight, bias = (
        part.detach().double().numpy() for part in (layer.project.weight, layer.open.weight, layer.open.bias)
    )
    even = [token / math.sqrt(sum(x * x for x in token) / len(token)) for token in hidden]
    parts = [(project @ token).reshape(3, heads, size) for token in even]  # query, key, value of each token
    result = np.zeros((weight.shape[0], len(hidden)))
    for t in range(len(hidden)):
        looked_at = range(prompt) if form == "bidirectional" and t < prompt else range(t + 1)
        found = []
        for head in range(heads):
            logits = np.array([parts[t][0, head] @ parts[j][1, head] / math.sqrt(size) for j in looked_at])
            share = np.exp(logits - logits.max())
            share /= share.sum()
            attended = sum(s * parts[j][2, head] for s, j in zip(share, looked_at, strict=True))
            found.append(attended + parts[t][2, head])
        result[:, t] = 1 / (1 + np.exp(-(weight @ np.concatenate(found) + bias)))
    return result
