"""The visible keys without gaps, for rules that use neighbours or parts of the cache."""

from __future__ import annotations

from torch import Tensor


def without_gaps(visible: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the visible keys without gaps, oldest first, and which entries are visible keys.

    Parameters
    ----------
    visible : Tensor
        bool ``[R, L, S, n]``.
    most : int
        ``m``, at least the largest number of keys that any head sees: `Step.most_visible`.

    Returns
    -------
    place : Tensor
        int64 ``[R, L, S, m]``. A head that sees fewer keys is padded with positions that are not visible.
    there : Tensor
        bool ``[R, L, S, m]``: false for the padding.

    Examples
    --------
    >>> import torch
    >>> place, there = without_gaps(torch.tensor([[[[True, False, True, True], [False, False, True, True]]]]), 3)
    >>> place.tolist(), there.tolist()
    ([[[[0, 2, 3], [2, 3, 0]]]], [[[[True, True, True], [True, True, False]]]])
    """
    place = (~visible).byte().argsort(dim=-1, stable=True)[..., :most]
    return place, visible.gather(-1, place)


def at(place: Tensor, vectors: Tensor) -> Tensor:
    """Return the vectors ``[., L, S, n, D]`` of the keys at `place`, ``[R, L, S, m, D]``."""
    runs, size = place.shape[0], vectors.shape[-1]
    return vectors.expand(runs, -1, -1, -1, -1).gather(-2, place[..., None].expand(*place.shape, size))
