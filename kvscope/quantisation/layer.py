"""One layer's quantised cache over a whole text: which keys and values attention reads as codes at which step.

A step attends to its own key and value, and to those of the residual window, in full precision; to the others as they
are read back from codes. Keys are quantised in groups of those that a head still holds, after the step's eviction.
Their codes depend on decisions: steps are taken in blocks that end where keys are quantised (`QuantisedLayer.stop`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.cache_scheme import HALF, CacheScheme
from kvscope.quantisation.codes import code_fp8, code_keys, code_values

Turn = Callable[[Tensor, Tensor], Tensor]  # keys [1, 1, n, D] and their positions [n] -> keys


@dataclass(frozen=True)
class Rotation:
    """A layer's rotary position: ``off`` removes it from keys, ``on`` applies it."""

    off: Turn
    on: Turn


class QuantisedLayer:
    """The keys and values of one layer in full precision and as codes, for all runs of a batch.

    Parameters
    ----------
    scheme : CacheScheme
        How they are quantised.
    key, value : Tensor
        ``[R, G, T, D]``, as the model computes them, keys after rotation.
    prompt : int
        Steps before this attend to everything in full precision: ``P`` with full prefill, 0 with streaming prefill.
    exact : torch.dtype
        In which codes are computed.
    rotation : Rotation or None
        Needed where keys are quantised without their position.
    window, chunk : int
        How many newest keys a query can attend to, and the size of the chunks it attends in; 0 for no limit.

    Attributes
    ----------
    key, value : Tensor
        In full precision, ``[R, G, T, D]``, in the dtype `exact`.
    coded_key, coded_value : Tensor
        As read back from codes; a key that is not quantised yet in full precision.
    group : Tensor
        int64 ``[R, G, T]``: number of each quantised key's group in its head; -1 before.
    """

    def __init__(
        self,
        scheme: CacheScheme,
        key: Tensor,
        value: Tensor,
        prompt: int,
        exact: torch.dtype,
        rotation: Rotation | None = None,
        window: int = 0,
        chunk: int = 0,
    ) -> None:
        self.scheme, self._prompt, self._rotation = scheme, prompt, rotation
        self._window, self._chunk = window, chunk
        self._kind = key.dtype
        self.key, self.value = key.to(exact), value.to(exact)
        self.coded_key = read_values(self.key, scheme, self._kind)[0] if scheme.per_token else self.key.clone()
        self.coded_value, self._value_outliers = read_values(self.value, scheme, self._kind)
        self.group = torch.full(key.shape[:3], -1, dtype=torch.int64, device=key.device)
        self._key_outliers = torch.zeros_like(self.group)
        self._groups = 0

    def stop(self, start: int, stop: int) -> int:
        """Return the end, at most `stop`, of the steps from `start` on between which no keys are quantised."""
        if start < self._prompt:
            return min(stop, self._prompt)
        return self.scheme.stop(start, stop)

    def coded(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return which keys, and which values, queries `start` to `stop` - 1 read as codes, bool ``[b, stop]``."""
        steps = range(start, stop)
        keys, values = (
            [count(t, self._prompt) if t >= self._prompt else 0 for t in steps]
            for count in (self.scheme.coded_keys, self.scheme.coded_values)
        )
        place = torch.arange(stop, device=self.key.device)
        late = place >= self.scheme.whole
        bounds = torch.tensor([keys, values], device=self.key.device)[..., None]  # [2, b, 1]
        coded_keys, coded_values = (place < bounds) & late
        return coded_keys, coded_values

    def output(self, row: Tensor, start: int) -> Tensor:
        """Return live rows ``[R, H, b, n]`` of queries from `start` on times the values they read, ``[R, H, b, D]``."""
        _, coded = self.coded(start, row.shape[-1])
        runs, groups = self.value.shape[:2]

        def times(part: Tensor, values: Tensor) -> Tensor:
            of_group = part.reshape(runs, groups, -1, part.shape[-1])
            return (of_group @ values[:, :, : part.shape[-1]].to(part.dtype)).view(*row.shape[:3], -1)

        return times(row * coded, self.coded_value) + times(row * ~coded, self.value)

    def quantise(self, tokens: int, held: Tensor) -> None:
        """Quantise the keys that become codes once so many tokens have come, of those in `held`, bool ``[R, G, n]``."""
        if self.scheme.per_token or tokens < self._prompt:
            return
        before = self.scheme.coded_keys(tokens - 1, self._prompt) if tokens > max(1, self._prompt) else 0
        stop = self.scheme.coded_keys(tokens, self._prompt)
        if stop <= before:
            return
        place = torch.arange(stop, device=self.key.device)
        members = held[..., :stop] & (place >= max(before, self.scheme.whole))
        if self._window:
            members &= place > tokens - self._window
        if self._chunk:
            members &= place >= tokens // self._chunk * self._chunk
        read, group, outliers = read_keys(
            self.key[:, :, :stop], members, place.expand(members.shape), self.scheme, self._rotation, self._kind
        )
        self.coded_key[:, :, :stop] = torch.where(members[..., None], read, self.coded_key[:, :, :stop])
        self.group[..., :stop] = torch.where(members, group + self._groups, self.group[..., :stop])
        self._key_outliers[..., :stop] += outliers
        self._groups += -(-stop // self.scheme.group)

    def bits(self, held: Tensor, start: int) -> Tensor:
        """Return the size of the cache at steps from `start` on, in bits, int64 ``[R, G, b]``.

        Parameters
        ----------
        held : Tensor
            bool ``[R, G, b, n]``: the keys that each step leaves in the cache. They are counted in the precision in
            which the step attended to them: codes, scales and zero points of 16 bit for each channel of a group of keys
            of which one is still held and for each group of channels of a value, 32 bit for an outlier (the number and
            its place), and 16 bit for a number in full precision.
        """
        keys, values = self.coded(start, held.shape[-1])
        scheme, (d, of_value) = self.scheme, (self.key.shape[-1], self.value.shape[-1])
        n = held.shape[-1]
        scales = 1 if scheme.kind == "fp8" else 2  # fp8 has no zero point

        def parts(size: int) -> int:
            return -(-size // scheme.group) if scheme.kind in ("kivi", "quanto") else 1

        per_value = scheme.bits * of_value + scales * HALF * parts(of_value)
        own = (held & values) * (per_value + 2 * HALF * self._value_outliers[:, :, None, :n])
        own = own + (held & ~values) * HALF * of_value + (held & ~keys) * HALF * d
        per_key = scheme.bits * d + (scales * HALF * parts(d) if scheme.per_token else 0)
        own = own + (held & keys) * (per_key + 2 * HALF * self._key_outliers[:, :, None, :n])
        total = own.sum(-1)
        if not scheme.per_token and self._groups:
            group = self.group[:, :, None, :n].clamp(min=0).expand(held.shape)
            there = held.new_zeros(*held.shape[:3], self._groups, dtype=torch.int8)
            there.scatter_reduce_(-1, group, (held & keys).to(torch.int8), "amax")
            total = total + there.sum(-1) * 2 * HALF * d
        return total


def read_keys(
    key: Tensor,
    members: Tensor,
    positions: Tensor,
    scheme: CacheScheme,
    rotation: Rotation | None,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys as read back from codes, their groups and outliers, as `code_keys` does.

    Where the scheme quantises keys without their position, it is removed before and applied after.

    Parameters
    ----------
    key : Tensor
        ``[..., n, D]``, in the dtype in which codes are computed.
    members : Tensor
        bool ``[..., n]``.
    positions : Tensor
        int64 ``[..., n]``: positions in the text.
    scheme, rotation
        As of `QuantisedLayer`.
    kind : torch.dtype
        Dtype of the cache, to which what is read back is rounded.
    """
    if not scheme.before_rotation:
        found = code_keys(key, members, scheme)
        return found.read.to(kind).to(key.dtype), found.group, found.outliers
    assert rotation is not None, "checked when the job was compiled"
    flat = positions.clamp(min=0).flatten()
    plain = rotation.off(torch.where(members[..., None], key, 0).reshape(1, 1, -1, key.shape[-1]), flat)
    found = code_keys(plain.view_as(key).to(key.dtype), members, scheme)
    turned = rotation.on(found.read.reshape(1, 1, -1, key.shape[-1]), flat).view_as(key).to(kind)
    return torch.where(members[..., None], turned.to(key.dtype), key), found.group, found.outliers


def read_values(value: Tensor, scheme: CacheScheme, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values ``[..., D]`` as read back from codes, rounded to the dtype `kind`, and their outliers ``[...]``.

    Keys are read in the same way where the scheme has scales for each token (`CacheScheme.per_token`).
    """
    if scheme.kind == "fp8":
        return code_fp8(value).to(kind).to(value.dtype), value.new_zeros(value.shape[:-1], dtype=torch.int64)
    read, outliers = code_values(value, scheme, kind)
    return read.to(kind).to(value.dtype), outliers
