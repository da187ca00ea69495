"""Q-filters: for every key/value head the direction in which the queries of a model point, in a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.gates.sealed_file import FileKind, same_weights

KIND = FileKind("kvscope-filters", 1, "filters", "filters.safetensors", "Make the file: kvscope gate filters TRACE.")
DIRECTIONS = "directions"  # the only tensor


@dataclass(frozen=True)
class FilterFacts:
    """Facts about filters.

    Attributes
    ----------
    model : str
        Name of the model that they were computed for.
    layers, kv_heads, size : int
        Its layers, key/value heads of each, and size of a head.
    weights : list of float
        Sample of the weights of the model, where the traces had it; otherwise empty.
    provenance : dict
        Traces, number of queries, versions.
    """

    model: str
    layers: int
    kv_heads: int
    size: int
    weights: list[float] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyFilters:
    """Directions ``[L, G, D]``, float64, and the facts about them."""

    facts: FilterFacts
    directions: Tensor

    def projections(self, layer: int, keys: Tensor) -> Tensor:
        """Return how far keys ``[..., G, n, D]`` of a layer point in its directions, ``[..., G, n]``, in float64."""
        return (keys.double() @ self.directions[layer].to(keys.device)[..., None])[..., 0]

    def require(self, name: str, *, layers: int, kv_heads: int, size: int, weights: Sequence[float]) -> None:
        """Raise UsageError unless the filters called `name` are for a model of these sizes and, if known, weights."""
        own, given = (self.facts.layers, self.facts.kv_heads, self.facts.size), (layers, kv_heads, size)
        if own != given:
            raise UsageError(
                "filters {} are for {}: {} layers, {} key/value heads of size {}; the model has {}, {}, {}".format(
                    name, self.facts.model, *own, *given
                ),
                "Make a file for this model: kvscope gate filters TRACE",
            )
        known, found = torch.tensor(self.facts.weights), torch.tensor(list(weights))
        if len(known) and len(found) and not same_weights(known, found):
            raise UsageError(
                f"filters {name} are for {self.facts.model}, and this model has other weights",
                "Make a file for this model: kvscope gate filters TRACE",
            )

    def write(self, path: Path) -> None:
        """Write the filters to `path` in float32; an existing file is replaced atomically."""
        KIND.write(path, self.facts, {DIRECTIONS: self.directions.float().contiguous()})


def load_filters(name: str) -> KeyFilters:
    """Return the filters of a file, or ``demo`` for those of the bundled model; cached until the file changes.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file holds no filters, is damaged, or of a newer kvscope.
    """
    path = KIND.path_of(name)
    status = path.stat()
    return _loaded(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> KeyFilters:
    facts, tensors = KIND.read(path, FilterFacts)
    directions = tensors[DIRECTIONS]
    if directions.shape != (facts.layers, facts.kv_heads, facts.size) or not bool(directions.isfinite().all()):
        raise KIND.damaged(path, "their numbers do not match their sizes")
    return KeyFilters(facts, directions.double())
