"""Import activation caches that are in memory: those of TransformerLens, and layers saved with nnsight."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.trace.blocks import Array
from kvscope.trace.import_files import Captured
from kvscope.trace.importer import ImportOptions, import_arrays
from kvscope.trace.reader import Trace
from kvscope.trace.record import ModelRecord

HOOK = re.compile(r"blocks\.(\d+)\.attn\.hook_(pattern|rot_q|rot_k|q|k|v)")
CLOSE = 0.01  # difference of weights up to which queries and keys give the rows: they may be in 16 bit
EXAMPLE = "Cache blocks.N.attn.hook_pattern, or give attention by layer: {0: tensor, 1: tensor}, each [B, H, T, T]."


class Cache(Protocol):
    """What is needed of a cache: names, and what is under a name."""

    def keys(self) -> Iterable[object]:
        """Return the names."""

    def __getitem__(self, name: Any) -> object:
        """Return the activation under a name."""


def import_cache(
    cache: Cache,
    output: Path | str,
    *,
    tokens: object = None,
    prompt: str | None = None,
    prompt_length: int | None = None,
    attention_mask: object = None,
    kv_heads: int | None = None,
    force: bool = False,
) -> Trace:
    """Write a trace from an activation cache of TransformerLens or nnsight, and return it.

    Parameters
    ----------
    cache : mapping
        Either the cache that ``run_with_cache`` of TransformerLens returns, or a dict with the same names:
        ``blocks.N.attn.hook_pattern`` ``[B, H, T, T]``, and optionally ``hook_q``, ``hook_k`` and ``hook_v``
        ``[B, T, H or G, D]``; if a model rotates them, ``hook_rot_q`` and ``hook_rot_k`` are used. Or attention
        ``[B, H, T, T]`` by layer, as saved with nnsight: the key is a number, or a name with one number, such as
        ``model.layers.3.self_attn``. Values are arrays or torch tensors; neither package is imported.
    output : Path
        Folder of the trace.
    tokens : array, optional
        Ids or texts of the tokens ``[B, T]`` or ``[T]``.
    prompt, prompt_length, kv_heads, force
        See `kvscope.import_maps`.
    attention_mask : array, optional
        ``[B, T]``: zero for padding, which is removed.

    Raises
    ------
    UsageError
        If the cache has no attention, layers are missing, or an array has the wrong shape.
    TraceError
        If a row is not causal, not finite, negative, or does not sum to one; if the trace exists.
    """
    hooks = _hooks(cache)
    by_layer = hooks["pattern"] if hooks else _by_number(cache)
    layers = sorted(by_layer)
    found: dict[str, Captured] = {"attention": [_array(by_layer[layer], 4, layer) for layer in layers]}
    notes = [] if layers == list(range(len(layers))) else [f"layers {layers} of the cache are numbered from 0"]
    found |= _vectors(hooks, layers, notes)
    if attention_mask is not None:
        found["attention_mask"] = np.asarray(_plain(attention_mask))
    if tokens is not None:
        found["tokens"] = np.asarray(_plain(tokens))
    options = ImportOptions(prompt, prompt_length, "LBHTT", kv_heads)
    found = {name: _with_sequences(name, value) for name, value in found.items()}
    made = hashlib.sha256()
    for rows in found["attention"]:
        made.update(np.ascontiguousarray(rows).tobytes())
    model = ModelRecord(id="imported from an activation cache", sha256=made.hexdigest())
    return import_arrays(found, model, Path(output), options, force=force, notes=notes)


def _hooks(cache: Cache) -> dict[str, dict[int, object]]:
    """Return activations by the kind of hook and layer; empty where the names are not those of TransformerLens."""
    found: dict[str, dict[int, object]] = {}
    for name in cache.keys():  # noqa: SIM118  a cache need not be a mapping
        match = HOOK.fullmatch(str(name))
        if match:
            found.setdefault(match[2], {})[int(match[1])] = cache[name]
    if found and "pattern" not in found:
        raise UsageError(f"the cache has hook_{', hook_'.join(sorted(found))}, and no hook_pattern", EXAMPLE)
    return found


def _by_number(cache: Cache) -> dict[int, object]:
    """Return attention by layer, of a mapping from layers."""
    found: dict[int, object] = {}
    for name in cache.keys():  # noqa: SIM118
        numbers = re.findall(r"\d+", str(name))
        if len(numbers) != 1:
            raise UsageError(f"{str(name)!r} in the cache is not a layer", EXAMPLE)
        if int(numbers[0]) in found:
            raise UsageError(f"the cache has layer {numbers[0]} twice", EXAMPLE)
        found[int(numbers[0])] = cache[name]
    if not found:
        raise UsageError("the cache is empty", EXAMPLE)
    return found


def _vectors(hooks: Mapping[str, Mapping[int, object]], layers: Sequence[int], notes: list[str]) -> dict[str, Captured]:
    """Return queries, keys and values by layer, ``[B, heads, T, D]``; of rotated ones those after the rotation."""
    found: dict[str, Captured] = {}
    for name, kinds in {"queries": ("rot_q", "q"), "keys": ("rot_k", "k"), "values": ("v",)}.items():
        own: Mapping[int, object] = next((hooks[kind] for kind in kinds if kind in hooks), {})
        if own and sorted(own) != list(layers):
            raise UsageError(
                f"the cache has {name} of layers {sorted(own)}, and attention of layers {list(layers)}",
                "Cache the same layers of both.",
            )
        if own:
            found[name] = [_array(own[layer], 4, layer).swapaxes(1, 2) for layer in layers]
    if {"queries", "keys"} & set(found) and not _gives_rows(hooks, found, layers):
        del_names = sorted({"queries", "keys"} & set(found))
        found = {name: value for name, value in found.items() if name not in del_names}
        notes.append(
            f"{' and '.join(del_names)} are not stored: the rows do not follow from them, as before a rotation; "
            "cache hook_rot_q and hook_rot_k too"
        )
    return found


def _gives_rows(
    hooks: Mapping[str, Mapping[int, object]], found: Mapping[str, Captured], layers: Sequence[int]
) -> bool:
    """Return whether the rows of the first layer follow from its queries and keys."""
    if not {"queries", "keys"} <= set(found):
        return False
    queries, keys = (np.asarray(found[name][0][0], np.float64) for name in ("queries", "keys"))
    rows = _array(hooks["pattern"][layers[0]], 4, layers[0])[0]  # [H, T, T]
    keys = np.repeat(keys, len(queries) // len(keys), 0)
    scores = queries @ keys.swapaxes(1, 2) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return bool(np.abs(weights / weights.sum(-1, keepdims=True) - rows).max() <= CLOSE)


def _with_sequences(name: str, value: Captured) -> Captured:
    """Return the tokens and the mask of one sequence with an axis of sequences."""
    one = name in ("tokens", "attention_mask") and isinstance(value, np.ndarray) and value.ndim == 1
    return np.asarray(value)[None] if one else value


def _array(value: object, axes: int, layer: int) -> Array:
    """Return an activation as an array of 32 bit with so many axes."""
    array = np.asarray(_plain(value), np.float32)
    if array.ndim != axes:
        raise UsageError(f"an activation of layer {layer} has the shape {list(array.shape)}", EXAMPLE)
    return array


def _plain(value: object) -> object:
    """Return what numpy reads: a tensor without gradients on the host, in 32 bit where numpy lacks its type."""
    if not hasattr(value, "shape") and hasattr(value, "value"):  # a proxy that has been saved
        value = value.value
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
