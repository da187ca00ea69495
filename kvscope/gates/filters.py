"""Q-filters: for every key/value head the direction in which the queries of a model point, in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.json_records import FieldError, decode, parse
from kvscope.core.output import replace_file
from kvscope.core.seal import SEAL, is_changed, sealed
from kvscope.gates.file import DEMO, digest_of

KIND, VERSION = "kvscope-filters", 1  # key in the metadata, and version of the format
BESIDE = "filters.safetensors"  # file name in the folder of a model
DIRECTIONS = "directions"  # the only tensor
AGAIN = "Make the file: kvscope gate filters TRACE."
SAME = 0.01  # relative tolerance when weights of models are compared, above the error of rounding to 16 bit


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
        if (
            len(known)
            and len(found)
            and bool((known - found).abs().gt(SAME * (known.abs() + known.abs().mean())).any())
        ):
            raise UsageError(
                f"filters {name} are for {self.facts.model}, and this model has other weights",
                "Make a file for this model: kvscope gate filters TRACE",
            )

    def write(self, path: Path) -> None:
        """Write the filters to `path` in float32; an existing file is replaced atomically."""
        tensors = {DIRECTIONS: self.directions.float().contiguous()}
        about = sealed({"version": VERSION, **asdict(self.facts), "tensors": digest_of(tensors)})
        replace_file(path, save(tensors, {KIND: json.dumps(about)}))


def load_filters(name: str) -> KeyFilters:
    """Return the filters of a file, or ``demo`` for those of the bundled model; cached until the file changes.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file holds no filters, is damaged, or of a newer kvscope.
    """
    path = Path(str(files("kvscope.model") / "demo" / BESIDE)) if name == DEMO else Path(name)
    if not path.is_file():
        raise UsageError(f"no filters {name}: {path} is not a file", AGAIN)
    status = path.stat()
    return _loaded(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _loaded(path: Path, changed: int, size: int) -> KeyFilters:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KIND)
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or holds no filters: {error}".splitlines()[0], AGAIN) from error
    if text is None:
        raise ModelError(f"{path} holds no filters of kvscope", AGAIN)
    facts = _facts(text, path, tensors)
    directions = tensors[DIRECTIONS]
    if directions.shape != (facts.layers, facts.kv_heads, facts.size) or not bool(directions.isfinite().all()):
        raise ModelError(f"filters {path} are damaged: their numbers do not match their sizes", AGAIN)
    return KeyFilters(facts, directions.double())


def _facts(text: str, path: Path, tensors: dict[str, Tensor]) -> FilterFacts:
    """Return the facts in the metadata of a file; raises ModelError if they, or the tensors, were changed."""
    try:
        about = parse(text.encode())
        if not isinstance(about, dict) or is_changed(about):
            raise FieldError("sha256", "it differs")
        version, digest = about.pop("version", None), about.pop("tensors", None)
        about.pop(SEAL, None)
        if isinstance(version, int) and version > VERSION:
            raise ModelError(f"filters {path} have format {version}, newer than this kvscope reads", "Update kvscope.")
        if version != VERSION or digest != digest_of(tensors):
            raise FieldError("tensors", "they differ from their checksum")
        return decode(about, FilterFacts)
    except ValueError as error:
        raise ModelError(f"filters {path} are damaged: {error}", AGAIN) from error
