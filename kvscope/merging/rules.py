"""Rules by which evicted keys and values are added to those that stay: CaM, D2O and KVMerger.

A rule is given what each key/value head of a layer holds at the end of a step, before the evicted keys leave: `Held`.
It returns the keys and values that are then in the cache. What is the papers' and what is ours is in docs/merging.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20  # limit for one tensor of evicted keys times keys


@dataclass(frozen=True)
class Held:
    """Keys of the heads of one layer, oldest first; where a head has fewer keys than another, the last are empty.

    Attributes
    ----------
    key, value : Tensor
        ``[R, G, n, D]``, keys as cached (after rotation); 0 where empty.
    evicted : Tensor
        bool ``[R, G, n]``: keys that leave after this step.
    stays : Tensor
        bool ``[R, G, n]``: keys that stay and that the next query sees, to which evicted ones may be added.
    mass : Tensor
        ``[R, G, n]``: attention that each key has received since it came, as a mean over the query heads of its group.
    draw : Tensor
        ``[R, G, n]``: a uniform number in [0, 1) for each key.
    """

    key: Tensor
    value: Tensor
    evicted: Tensor
    stays: Tensor
    mass: Tensor
    draw: Tensor


@dataclass(frozen=True)
class Merged:
    """Keys and values after merging, ``[R, G, n, D]``, and which of them are new, bool ``[R, G, n]``."""

    key: Tensor
    value: Tensor
    changed: Tensor


def cam(held: Held, tokens: int, chance: str) -> Merged:
    """Return values after CaM: a part of an evicted value is added to each of the next `tokens` that stay.

    The value is merged if the draw of its key is below a chance, and then divided equally among them. The chance is the
    mass of the key divided by the mean mass of those keys, or, with ``max``, by the largest mass in the cache. Keys do
    not change. An evicted key after which none stays is not merged.
    """
    index, there = _evicted(held)  # [R, G, E]
    rank = held.stays.cumsum(-1)  # [R, G, n]
    most = torch.where(held.evicted | held.stays, held.mass, 0).amax(-1, keepdim=True)  # [R, G, 1]
    value, changed = held.value.clone(), torch.zeros_like(held.stays)
    for part in _blocks(index, held):
        before = rank.gather(-1, index[..., part])[..., None]  # [R, G, e, 1]
        takes = held.stays[:, :, None] & (rank[:, :, None] > before) & (rank[:, :, None] <= before + tokens)
        count = takes.sum(-1)  # [R, G, e]
        usual = most if chance == "max" else (takes * held.mass[:, :, None]).sum(-1) / count.clamp(min=1)
        below = torch.nan_to_num(held.mass.gather(-1, index[..., part]) / usual, nan=0.0, posinf=1.0)
        merges = there[..., part] & (count > 0) & (held.draw.gather(-1, index[..., part]) < below)
        share = (takes & merges[..., None]) / count.clamp(min=1)[..., None].to(value.dtype)  # [R, G, e, n]
        value += share.transpose(2, 3) @ _at(held.value, index[..., part])
        changed |= (takes & merges[..., None]).any(2)
    return Merged(held.key, value, changed)


def d2o(held: Held, beta: float, threshold: Tensor) -> tuple[Merged, Tensor]:
    """Return keys and values after D2O: each evicted key is added to the most similar one that stays, or discarded.

    Parameters
    ----------
    held : Held
        The layer.
    beta : float
        Share of this step in the new threshold.
    threshold : Tensor
        ``[R]``: the threshold after the layer's last eviction; NaN before the first.

    Returns
    -------
    merged : Merged
        A key that stays is replaced by the mean of itself and of those that are merged into it, each of these times
        its similarity; its value in the same way.
    threshold : Tensor
        ``[R]``: the moving average of the mean of the largest cosines, with those of this step. A key is merged if its
        largest cosine is not below it.
    """
    index, there = _evicted(held)
    unit = held.key / held.key.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(held.key.dtype).tiny)
    found = []
    for part in _blocks(index, held):
        cosine = _at(unit, index[..., part]) @ unit.transpose(2, 3)  # [R, G, e, n]
        found.append(cosine.masked_fill(~held.stays[:, :, None], -torch.inf).max(-1))
    similar, nearest = (torch.cat(parts, -1) for parts in zip(*found, strict=True))  # [R, G, E]
    there = there & (similar > -torch.inf)
    count = there.sum((1, 2))  # [R]
    mean = torch.where(there, similar, 0).sum((1, 2)) / count.clamp(min=1)
    later = torch.where(threshold.isnan(), mean, (1 - beta) * threshold + beta * mean)
    threshold = torch.where(count > 0, later, threshold)
    merges = there & (similar >= threshold[:, None, None])
    weight = torch.where(merges, similar, 0)
    return _added(held, index, nearest, weight, merges.to(weight.dtype), merges), threshold


def kvmerger(held: Held, threshold: float) -> Merged:
    """Return keys and values after KVMerger: the evicted keys of a run are added to one key of it that stays.

    A run is a sequence of neighbours in the cache, each with a cosine of at least `threshold` to the one before. The
    key of a run that stays and has received most attention (of equals the oldest) is replaced by a weighted mean of
    itself, with weight 1, and the evicted ones, with weights ``exp(-(d / mean(d))^2)`` of their distances ``d`` to it;
    its value by the mean with the same weights. Evicted keys of a run of which none stays are not merged.
    """
    key, n = held.key, held.key.shape[2]
    present = held.evicted | held.stays
    unit = key / key.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(key.dtype).tiny)
    begins = torch.ones_like(present)
    begins[..., 1:] = ((unit[:, :, 1:] * unit[:, :, :-1]).sum(-1) < threshold) | ~present[..., 1:]
    run = begins.cumsum(-1) - 1  # [R, G, n]
    mass = torch.where(held.stays, held.mass, -torch.inf)
    most = torch.full_like(mass, -torch.inf).scatter_reduce(-1, run, mass, "amax").gather(-1, run)
    place = torch.arange(n, device=key.device).expand(run.shape)
    of_run = torch.full_like(run, n).scatter_reduce(-1, run, torch.where(held.stays & (mass == most), place, n), "amin")
    pivot = of_run.gather(-1, run)  # [R, G, n], n where no key of the run stays
    merges = held.evicted & (pivot < n)
    pivot = pivot.clamp(max=n - 1)
    distance = torch.where(merges, (key - _at(key, pivot)).norm(dim=-1), 0)
    sums, counts = (torch.zeros_like(mass).scatter_add(-1, pivot, part) for part in (distance, merges.to(mass.dtype)))
    mean = (sums / counts.clamp(min=1)).gather(-1, pivot)
    weight = torch.exp(-((distance / torch.where(mean > 0, mean, 1)) ** 2))
    weight = torch.where(merges, weight, 0)
    return _added(held, place, pivot, weight, weight, merges)


def _added(held: Held, index: Tensor, target: Tensor, weight: Tensor, share: Tensor, merges: Tensor) -> Merged:
    """Return keys and values after the keys at `index` have been added to those at `target`, all ``[R, G, E]``.

    Each is added `weight` times; a sum is then divided by 1 plus the sum of `share`.
    """
    changed = torch.zeros_like(held.mass).scatter_add(-1, target, merges.to(held.mass.dtype)) > 0
    whole = 1 + torch.zeros_like(held.mass).scatter_add(-1, target, share)

    def after(vectors: Tensor) -> Tensor:
        where = target[..., None].expand(-1, -1, -1, vectors.shape[-1])
        return vectors.scatter_add(2, where, _at(vectors, index) * weight[..., None]) / whole[..., None]

    return Merged(after(held.key), after(held.value), changed)


def _evicted(held: Held) -> tuple[Tensor, Tensor]:
    """Return the places of the evicted keys, oldest first, int64 ``[R, G, E]``, and which of them are there, bool."""
    most = int(held.evicted.sum(-1).max())
    index = (~held.evicted).byte().argsort(dim=-1, stable=True)[..., :most]
    return index, held.evicted.gather(-1, index)


def _blocks(index: Tensor, held: Held) -> list[slice]:
    """Return parts of the evicted keys, so that a tensor of them times all keys is within the limit."""
    runs, groups, n, _ = held.key.shape
    size = max(1, BLOCK_BYTES // (runs * groups * n * held.key.itemsize))
    return [slice(start, start + size) for start in range(0, index.shape[-1], size)]


def _at(vectors: Tensor, index: Tensor) -> Tensor:
    """Return the vectors ``[R, G, E, D]`` at `index`, of ``[R, G, n, D]``."""
    return vectors.gather(2, index[..., None].expand(-1, -1, -1, vectors.shape[-1]))
