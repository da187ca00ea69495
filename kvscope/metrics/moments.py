"""Sums over the keys of a row that a mask selects, from which most metrics are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.kernels import available, triton_available
from kvscope.kernels import device as devices
from kvscope.kernels.moments import masked_sums

SINKS = 4  # positions that are left out where a metric says "no sinks" (StreamingLLM, arXiv:2309.17453)


@dataclass(frozen=True)
class Moments:
    """Sums over some keys of each row, ``[R, L, H, b]`` (or without ``R``), in float64 whatever the rows are in.

    Attributes
    ----------
    mass : Tensor
        Weights.
    rest : Tensor
        Weights of keys beyond the first `SINKS` positions.
    squares : Tensor
        Squares of weights.
    keys : Tensor
        Number of keys.
    """

    mass: Tensor
    rest: Tensor
    squares: Tensor
    keys: Tensor


def moments(full: Tensor, mask: Tensor, steps: Tensor, other: Tensor | None = None) -> Moments:
    """Return the sums over the keys of rows that a mask selects, and `other` too if it is given.

    Parameters
    ----------
    full : Tensor
        Rows ``[L, H, b, n]``, or ``[R, L, H, b, n]`` where each run has its own; zero beyond the query's position.
    mask : Tensor
        bool ``[R, L, G, b, n]``, of groups of query heads; false beyond the query's position.
    steps : Tensor
        int ``[b]``: position of each query.
    other : Tensor, optional
        bool ``[R, L, H, b, n]``.
    """
    rows = full if full.ndim == 5 else full[None]
    if devices.on_cpu(rows.device) and available():
        also = None if other is None else other.expand(mask.shape[0], -1, -1, -1, -1).numpy()
        return Moments(
            *torch.from_numpy(masked_sums(rows.detach().numpy(), mask.numpy(), also, steps.numpy(), SINKS)).unbind(-1)
        )
    if rows.device.type == "cuda" and triton_available():
        from kvscope.kernels import moments_triton  # loads triton, which only a GPU needs

        return Moments(*moments_triton.masked_sums(rows.detach(), mask, other, steps, SINKS).unbind(-1))
    shown = mask.repeat_interleave(rows.shape[2] // mask.shape[2], dim=2)
    shown = shown if other is None else shown & other
    return summed(rows * shown, shown.sum(-1))


def summed(rows: Tensor, keys: Tensor) -> Moments:
    """Return the sums over whole rows ``[., L, H, b, n]``; `keys` is how many each has."""
    exact = torch.float64
    mass, rest = rows.sum(-1, dtype=exact), rows[..., SINKS:].sum(-1, dtype=exact)
    return Moments(mass, rest, rows.to(exact).square().sum(-1), keys.to(exact))
