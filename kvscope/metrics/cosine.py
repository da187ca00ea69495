"""How similar the live row is to the ideal and the full row: cosine similarities (A2SF, section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric


@metric("ideal_cosine", direction="higher", range=(0.0, 1.0), when_nothing_evicted=None)
def ideal_cosine(rows: Rows) -> Tensor:
    """Cosine of the live row and the ideal row, at each step (A2SF, arXiv:2407.20485, section 4.3).

    The live row is the attention over the visible keys, divided by its sum. The ideal row is the full row on the
    current key and the ``B`` heaviest others, divided by its sum. A row without mass has cosine 0.
    """
    if rows.coded is not None:
        return cosine(_product(rows, rows.ideal_mask), _squares(rows), rows.best.squares)
    return cosine(rows.both.squares, rows.kept.squares, rows.best.squares)


@metric("ideal_cosine_flattened", direction="higher", range=(0.0, 1.0), when_nothing_evicted=None, pooled=True)
def ideal_cosine_flattened(rows: Rows) -> Tensor:
    """Cosine of a head's live and ideal rows, with the rows of all steps joined into one long vector.

    The rows are those of `ideal_cosine`. A2SF (arXiv:2407.20485) does not say which of the two it reports. Every step
    of a head has the same value; a head whose rows have no mass has cosine 0.
    """
    live, ideal = rows.norm(rows.kept), rows.norm(rows.best)
    if rows.coded is not None:
        ideal = rows.norm(rows.best)
        terms = [_product(rows, rows.ideal_mask) / ideal, _squares(rows), rows.best.squares / ideal**2]
        return torch.stack([term.expand(terms[0].shape) for term in terms], dim=-1)
    products = [rows.both.squares / (live * ideal), rows.kept.squares / live**2, rows.best.squares / ideal**2]
    return torch.stack(products, dim=-1)


@metric("full_cosine", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def full_cosine(rows: Rows) -> Tensor:
    """Cosine of the live row and the full row.

    The live row is the attention over the visible keys, divided by its sum. A row without mass has cosine 0.
    """
    if rows.coded is not None:
        return cosine(_product(rows), _squares(rows), rows.all.squares)
    return cosine(rows.kept.squares, rows.kept.squares, rows.all.squares)


def _product(rows: Rows, mask: Tensor | None = None) -> Tensor:
    """Return the products of the live rows of a quantised cache and the full rows, on the keys of a mask or on all."""
    product = rows.live * rows.full
    return (product if mask is None else product * mask).sum(-1, dtype=torch.float64)


def _squares(rows: Rows) -> Tensor:
    """Return the squares of the live rows of a quantised cache."""
    return rows.live.square().sum(-1, dtype=torch.float64)


def cosine(product: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of two rows from their product and their squares; 0 where one of them is zero.

    A live row is the full row on some keys times a factor, which a cosine does not depend on.
    """
    norms = (one * other).sqrt()
    return (product / torch.where(norms > 0, norms, 1)).clamp(0.0, 1.0)  # rounding alone can pass 1
