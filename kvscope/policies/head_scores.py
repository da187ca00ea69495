"""Scores of heads in a file: how much each head of a model needs keys from far back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvscope.core.errors import UsageError

FORMS = "a table of numbers with a line for each layer (.tsv, as duo-attention's), or JSON of the form of HeadKV's"


def head_scores(file: str, n_layers: int, kv_heads: int) -> Tensor:
    """Return the scores in a file for every layer and key/value head of a model, float64 ``[n_layers, kv_heads]``.

    Scores of query heads are averaged over those that share a key/value head.

    Parameters
    ----------
    file : str
        Path. A table has a line for each layer and a column for each head, separated by tabs, as
        ``full_attention_heads.tsv`` of mit-han-lab/duo-attention. JSON is an object with keys such as ``"12-3"`` for
        head 3 of layer 12, and a number or a list of numbers for each, which are averaged, as ``head_score/*.json`` of
        FYYFU/HeadKV.
    n_layers, kv_heads : int
        Sizes of the model.

    Raises
    ------
    UsageError
        If the file cannot be read, or is for a model of other sizes.
    """
    table = _read(file, _changed(file))
    rows, columns = len(table), len(table[0])
    if rows != n_layers or columns % kv_heads:
        raise UsageError(
            f"{file} has scores of {rows} layers with {columns} heads, and the model has {n_layers} with {kv_heads}",
            "Give the scores of this model: a line for each layer, a column for each key/value or query head.",
        )
    return torch.tensor(table, dtype=torch.float64).reshape(rows, kv_heads, -1).mean(-1)


def _changed(file: str) -> tuple[int, int]:
    """Return when a file was changed and its size, so that one that was written again is read again; 0 without it."""
    try:
        found = Path(file).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=8)
def _read(file: str, changed: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """Return the table of a file: layers of heads, equally many in each."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}", f"Give the path of a file of head scores: {FORMS}.") from error
    try:
        table = _of_json(json.loads(text)) if text.lstrip().startswith("{") else _of_lines(text)
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{file} holds no scores of heads: {error}", f"It must be {FORMS}.") from error
    if (
        not table
        or len({len(row) for row in table}) != 1
        or not all(math.isfinite(each) for row in table for each in row)
    ):
        raise UsageError(
            f"{file} holds no scores of heads: layers differ, or numbers are missing", f"It must be {FORMS}."
        )
    return table


def _of_lines(text: str) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(each) for each in line.split()) for line in text.splitlines() if line.strip())


def _of_json(found: dict[str, float | Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    scores = {tuple(map(int, name.split("-"))): _mean(value) for name, value in found.items()}
    layers, heads = (1 + max(name[axis] for name in scores) for axis in (0, 1))
    return tuple(tuple(scores[layer, head] for head in range(heads)) for layer in range(layers))


def _mean(value: float | Sequence[float]) -> float:
    return math.fsum(value) / len(value) if isinstance(value, list) else float(value)  # type: ignore[arg-type]
