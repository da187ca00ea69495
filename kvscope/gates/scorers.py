"""Scorers of keys: for each layer a small module that predicts, from the layer's input, how much a key is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvscope.core.errors import UsageError
from kvscope.gates.sealed_file import FileKind, same_weights

KIND = FileKind(
    "kvscope-scorers", 1, "scorers", "scorers.safetensors", "Make the file: kvscope gate scorers TRACE TRACE."
)


@dataclass(frozen=True)
class ScorerFacts:
    """Facts about scorers.

    Attributes
    ----------
    model : str
        Name of the model that they were trained for.
    layers, hidden, kv_heads : int
        Its layers, the size of a layer input, and the key/value heads of a layer.
    width : int
        Size of the hidden layer of each scorer; 0: it is linear.
    weights : list of float
        Sample of the weights of the model (`kvscope.model.sample`).
    provenance : dict
        Traces, settings, errors on held-out prompts, versions.
    """

    model: str
    layers: int
    hidden: int
    kv_heads: int
    width: int
    weights: list[float] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


class LayerScorer(nn.Module):
    """The scorer of one layer: ``W x + b``, or ``W2 gelu(W1 x + b1) + b2``, a number for each key/value head."""

    def __init__(self, hidden: int, kv_heads: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, width) if width else None
        self.outer = nn.Linear(width or hidden, kv_heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores ``[..., T, G]`` from layer inputs ``[..., T, hidden]``, in the dtype of the inputs."""
        if self.inner is not None:
            within = functional.linear(hidden, self.inner.weight.to(hidden), self.inner.bias.to(hidden))
            hidden = functional.gelu(within)
        return functional.linear(hidden, self.outer.weight.to(hidden), self.outer.bias.to(hidden))


class KeyScorers(nn.Module):
    """The scorers of all layers of a model, and the facts about them."""

    def __init__(self, facts: ScorerFacts) -> None:
        super().__init__()
        self.facts = facts
        self.layers = nn.ModuleList(LayerScorer(facts.hidden, facts.kv_heads, facts.width) for _ in range(facts.layers))

    def scores(self, layer: int, hidden: Tensor) -> Tensor:
        """Return the score of each key, ``[..., G, T]``, from the inputs ``[..., T, hidden]`` of a layer's attention.

        It is the predicted natural logarithm of the largest weight that a second reading of the prompt gives the key.
        """
        found: Tensor = self.layers[layer](hidden)
        return found.transpose(-1, -2)

    def require(self, name: str, *, layers: int, hidden: int, kv_heads: int, weights: Sequence[float]) -> None:
        """Raise UsageError unless the scorers called `name` are for the model of these sizes and weights."""
        own, given = (self.facts.layers, self.facts.hidden, self.facts.kv_heads), (layers, hidden, kv_heads)
        todo = "Train some for this model: kvscope gate scorers TRACE TRACE"
        if own != given:
            raise UsageError(
                "scorers {} are for {}: {} layers, hidden size {}, {} key/value heads; the model has {}, {}, {}".format(
                    name, self.facts.model, *own, *given
                ),
                todo,
            )
        if not same_weights(torch.tensor(self.facts.weights), torch.tensor(list(weights))):
            raise UsageError(f"scorers {name} are for {self.facts.model}, and this model has other weights", todo)

    def write(self, path: Path) -> None:
        """Write the scorers to `path`, their parameters in float16; an existing file is replaced atomically."""
        KIND.write(path, self.facts, {name: part.detach().cpu().half() for name, part in self.state_dict().items()})


def load_scorers(name: str) -> KeyScorers:
    """Return the scorers of a file, or ``demo`` for those of the bundled model; cached until the file changes.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file holds no scorers, is damaged, or of a newer kvscope.
    """
    path = KIND.path_of(name)
    status = path.stat()
    return _loaded(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> KeyScorers:
    facts, tensors = KIND.read(path, ScorerFacts)
    try:
        scorers = KeyScorers(facts)
        scorers.load_state_dict(tensors)
    except RuntimeError as error:
        raise KIND.damaged(path, "their numbers do not match their sizes") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise KIND.damaged(path, "some of their numbers are not finite")
    return scorers.requires_grad_(False).eval()
