"""Arrange captured attention: which axis is what, steps of generation as rows, and padding removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.trace.blocks import Array
from kvscope.trace.import_files import NAMES, Captured

PER_KEY = ("value_l1", "value_l2", "key_l2")
PER_QUERY = ("sink_mass",)
VECTORS = ("queries", "keys", "values")
TOKENS = ("tokens", "input_ids", "sequences")
ATTENTION = "BLHQK"  # sequences, layers, query heads, queries, keys: as the functions after this one take them
EXAMPLE = "Name its axes, as --axes LBHTT: L layers, B sequences, H heads, T queries, T keys."


@dataclass(frozen=True)
class Arranged:
    """Captured sequences, each with arrays whose first axis has length 1, and what was assumed about them.

    Attributes
    ----------
    sequences : list of dict of str to array
        ``attention`` ``[1, L, H, T, T]``, norms ``[1, L, G, T]``, sink_mass ``[1, L, H, T]``, vectors
        ``[1, L, G or H, T, D]``, ``tokens`` ``[1, T]``, ``prompt_length`` ``[1]``; only those that the file has.
    assumed : list of str
        What the file does not say.
    """

    sequences: list[dict[str, Array]]
    assumed: list[str]


def arrange(found: Mapping[str, Captured], axes: str | None, prompt_length: int | None = None) -> Arranged:
    """Return the sequences of a file.

    Parameters
    ----------
    found : mapping
        Arrays by name, as `read_captured` returns them.
    axes : str, optional
        A letter for each axis of attention: ``L`` layers, ``B`` sequences, ``H`` heads, and twice ``T``, queries before
        keys. Other arrays have the same axes up to the first ``T``.
    prompt_length : int, optional
        Tokens of every prompt, padding included; replaces an array of that name.

    Raises
    ------
    UsageError
        If arrays have other axes, or do not fit together.
    """
    assumed: list[str] = []
    name = next(name for name in NAMES if name in found)
    maps, prompt = _stacked(found[name], name, assumed)
    letters = _letters(axes) if axes is not None else _guessed(maps, found[name], name, assumed)
    attention = _ordered(maps, letters, ATTENTION, name)
    arrays = {"attention": attention}
    for each in (*PER_KEY, *PER_QUERY, *VECTORS):
        if each in found:
            own = letters.replace("K", "") + ("D" if each in VECTORS else "")
            target = "BLHQD" if each in VECTORS else "BLHQ"
            arrays[each] = _ordered(_stacked(found[each], each, [])[0], own, target, each)
    count, length = len(attention), attention.shape[-1]
    if 0 in attention.shape:
        raise UsageError(f"{name} has the shape {list(maps.shape)}", "Make all of its axes longer than 0.")
    arrays |= _tokens(found, count, length, "B" in letters, assumed)
    if "prompt_length" in found or prompt_length is not None:
        arrays["prompt_length"] = _prompt_lengths(found.get("prompt_length"), prompt_length, count)
    elif prompt is not None:
        arrays["prompt_length"] = np.full(count, prompt)
        assumed.append(f"the prompt has {prompt} tokens, the queries of the first step")
    for each, array in arrays.items():
        if len(array) != count or 0 in array.shape:
            raise UsageError(
                f"{each} has the shape {list(array.shape)}", f"Make its first axis {count}, none of them 0."
            )
    if "attention_mask" not in found:
        return Arranged([{each: array[s : s + 1] for each, array in arrays.items()} for s in range(count)], assumed)
    mask = _by_sequence(found["attention_mask"], "B" in letters)
    return Arranged(list(_trimmed(arrays, mask, assumed)), assumed)


def _tokens(
    found: Mapping[str, Captured], count: int, length: int, batched: bool, assumed: list[str]
) -> dict[str, Array]:
    """Return the tokens ``[B, T]`` of a file that has them, without a last one that was generated but not read."""
    name = next((each for each in TOKENS if each in found), None)
    if name is None:
        return {}
    tokens = _by_sequence(found[name], batched)
    if tokens.shape == (count, length + 1):
        assumed.append(f"the last of {length + 1} {name} has no attention, and is omitted")
        return {"tokens": tokens[:, :length]}
    return {"tokens": tokens}


def _prompt_lengths(found: Captured | None, given: int | None, count: int) -> Array:
    """Return ``P`` of each sequence, that of the user before that of the file."""
    lengths = np.asarray(found if given is None else given).ravel()
    if len(lengths) not in (1, count):
        raise UsageError(f"prompt_length has {len(lengths)} numbers for {count} sequences", "Write one for each.")
    if not (lengths == np.round(lengths)).all():
        raise UsageError(f"prompt_length is not {count} whole numbers", "Save one for each sequence, or one for all.")
    return np.broadcast_to(lengths, (count,))


def _letters(axes: str) -> str:
    """Return axes with ``B``, ``L``, ``H``, ``Q`` and ``K`` from those that the user names."""
    letters = axes.strip().upper().replace("S", "B")
    if letters.count("T") == 2:
        letters = letters.replace("T", "Q", 1).replace("T", "K", 1)
    if not set("QK") <= set(letters) <= set(ATTENTION) or len(set(letters)) < len(letters):
        raise UsageError(f"axes {axes!r} are not those of attention", EXAMPLE)
    return letters


def _guessed(maps: Array, given: Captured, name: str, assumed: list[str]) -> str:
    """Return the axes that are assumed for attention with this many of them, and add a line that says so."""
    listed = isinstance(given, list)
    if maps.ndim not in (4, 5):
        raise UsageError(f"{name} has the shape {list(maps.shape)}", f"Save it as [L, H, T, T]. {EXAMPLE}")
    letters = "LHQK" if maps.ndim == 4 else "LBHQK" if listed or name == "attentions" else "BLHQK"
    sizes = dict(zip(letters, maps.shape, strict=True))
    words = f"{sizes['L']} layers of {sizes.get('B', 1)} sequences with {sizes['H']} heads"
    readable = letters.replace("Q", "T").replace("K", "T")
    line = f"the axes of {name}, {list(maps.shape)}, are {readable}: {words}"
    if letters == "BLHQK" and sizes["L"] == 1 < sizes["B"]:
        line += "; for layers of one sequence give --axes LBHTT"
    assumed.append(line)
    return letters


def _stacked(given: Captured, name: str, assumed: list[str]) -> tuple[Array, int | None]:
    """Return one array, with the layers first where they are a list; of steps, also the queries of the first."""
    if not isinstance(given, list):
        return given, None
    if not given:
        raise UsageError(f"{name} is an empty list", EXAMPLE)
    if any(isinstance(part, list) for part in given):
        steps = [part for part in given if isinstance(part, list)]
        if len(steps) < len(given) or len({len(step) for step in steps}) > 1:
            raise UsageError(f"{name} does not have the same layers in every step", EXAMPLE)
        layers = [_rows_of_steps([step[layer] for step in steps], name, layer) for layer in range(len(steps[0]))]
        assumed.append(f"{name} is a list of {len(steps)} steps of generation, each with {len(layers)} layers")
        return np.stack(layers), np.asarray(steps[0][0]).shape[2]
    arrays = [np.asarray(part) for part in given]
    if len({array.shape for array in arrays}) > 1:
        raise UsageError(f"the arrays of {name} have different shapes", "Save layers of the same shape.")
    return np.stack(arrays), None


def _rows_of_steps(steps: Sequence[Captured], name: str, layer: int) -> Array:
    """Return attention ``[B, H, T, T]`` of a layer from that of each step, ``[B, H, queries, keys so far]``."""
    arrays = [np.asarray(step) for step in steps]
    for array in arrays:
        if array.ndim != 4 or array.shape[:2] != arrays[0].shape[:2]:
            raise UsageError(
                f"{name}, layer {layer}: a step has the shape {list(array.shape)}", "Save [B, H, queries, keys]."
            )
    bounds = np.cumsum([0, *(array.shape[2] for array in arrays)]).tolist()
    for step, (array, stop) in enumerate(zip(arrays, bounds[1:], strict=True)):
        if array.shape[3] != stop:
            raise UsageError(
                f"{name}, layer {layer}: step {step} has {array.shape[3]} keys, and {stop} tokens were read until then",
                "Generate with a cache that keeps every key, neither static nor sliding.",
            )
    whole = np.zeros((*arrays[0].shape[:2], bounds[-1], bounds[-1]), arrays[0].dtype)
    for array, (start, stop) in zip(arrays, pairwise(bounds), strict=True):
        whole[:, :, start:stop, :stop] = array
    return whole


def _ordered(array: Array, axes: str, target: str, name: str) -> Array:
    """Return an array with its axes in the order of `target`, and axes of length 1 for those that it lacks."""
    if array.ndim != len(axes):
        readable = axes.replace("Q", "T").replace("K", "T")
        raise UsageError(f"{name} has the shape {list(array.shape)}", f"Its axes must be {readable}. {EXAMPLE}")
    ordered = array.transpose([axes.index(letter) for letter in target if letter in axes])
    return np.expand_dims(ordered, [place for place, letter in enumerate(target) if letter not in axes])


def _by_sequence(given: Captured, batched: bool) -> Array:
    """Return an array ``[B, T]``; one without sequences, ``[T]``, is that of the only one."""
    array = np.asarray(given)
    return array if array.ndim > 1 or batched else array[None]


def _trimmed(arrays: Mapping[str, Array], mask: Array, assumed: list[str]) -> Iterator[dict[str, Array]]:
    """Yield the arrays of each sequence without the tokens that its mask excludes, at its beginning or its end."""
    count, length = len(arrays["attention"]), arrays["attention"].shape[-1]
    if mask.ndim != 2 or len(mask) != count or not 1 <= mask.shape[1] <= length:
        raise UsageError(f"attention_mask has the shape {list(mask.shape)}", f"Make it {[count, length]} (B, T).")
    covered = mask.shape[1]
    kept = np.pad(mask != 0, ((0, 0), (0, length - covered)), constant_values=True)  # tokens generated after the mask
    for sequence, row in enumerate(kept):
        places = np.flatnonzero(row)
        if not len(places) or not row[places[0] : places[-1] + 1].all():
            raise UsageError(
                f"attention_mask of sequence {sequence} excludes {'all' if not len(places) else 'inner'} tokens",
                "Pad at the left or at the right only.",
            )
        start, stop = int(places[0]), int(places[-1]) + 1
        if stop - start < length:
            assumed.append(f"sequence {sequence}: {length - stop + start} tokens of padding are removed")
        one = {name: _cut(name, array[sequence : sequence + 1], start, stop) for name, array in arrays.items()}
        if covered < length and "prompt_length" not in arrays:
            assumed.append(f"sequence {sequence}: the prompt has {int(row[:covered].sum())} tokens, those of the mask")
            one["prompt_length"] = np.array([row[:covered].sum()])
        yield one


def _cut(name: str, array: Array, start: int, stop: int) -> Array:
    """Return the tokens `start` to `stop` - 1 of an array of one sequence; a prompt's length counts tokens kept."""
    if name == "attention":
        return array[..., start:stop, start:stop]
    if name == "prompt_length":
        return np.minimum(array, stop) - start
    return array[..., start:stop, :] if name in VECTORS else array[..., start:stop]
