"""The step that every policy goes through: see, score, evict.

One `Scan` steps one policy under several budgets over a group of layers of one sequence. Tensors carry ``R`` runs
(budgets), ``L`` layers, ``S`` deciding heads (``G`` key/value heads, or 1 where the layer decides as one) and key
positions. The same scan serves recorded rows (open loop) and rows that are computed as it goes (closed loop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.budget import Prefill
from kvscope.errors import ReplayError, UsageError
from kvscope.policies.base import Policy, Step

NEVER = 2**31 - 1  # the `leave` of a key that is held to the end


@dataclass(frozen=True)
class Shape:
    """Sizes of one group of layers of one sequence, and which layers and sequence they are.

    Attributes
    ----------
    layers : tuple of int
        Layer numbers, ``L`` of them; draws depend on the number, not on the grouping.
    heads, kv_heads : int
        ``H`` and ``G``.
    prompt, length : int
        ``P`` and ``T``.
    sequence : int
        Number of the sequence.
    windows : tuple of int or None
        For each layer, the number of newest keys the model itself can see (sliding-window layers), or None.
    """

    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    prompt: int
    length: int
    sequence: int = 0
    windows: tuple[int | None, ...] = ()

    def reach(self) -> list[int]:
        """Return how many keys each layer can see at most, ``L`` numbers."""
        windows = self.windows or (None,) * len(self.layers)
        return [self.length if window is None else min(window, self.length) for window in windows]


class Scan:
    """One policy under several budgets, stepped over a group of layers.

    Parameters
    ----------
    policy : Policy
        What scores the keys.
    budgets : sequence of int
        ``B`` of each run, in keys per key/value head.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        Whether the prompt's rows see everything and the choice is made once at its end, or eviction starts when the
        cache first exceeds the budget.
    signals : mapping of str to Tensor
        ``value_l1`` and so on, ``[L, G, T]``, for what the policy needs beside the weights.
    missing_mass : Tensor or None
        ``[L, H, T]``: what a learned sink takes from each row; the live row is divided by kept mass plus this.

    Attributes
    ----------
    leave : Tensor
        int32 ``[R, L, S, T]``: first step at which the key is gone, `NEVER` if it stays. A key enters at its position.
    evictions : Tensor
        int64 ``[R, L, S]``: keys that the policy evicted (what a sliding-window layer forgets is not counted).

    Raises
    ------
    UsageError
        If protected keys alone exceed a budget.
    """

    def __init__(
        self,
        policy: Policy,
        budgets: Sequence[int],
        shape: Shape,
        prefill: Prefill = "full",
        signals: Mapping[str, Tensor] | None = None,
        *,
        missing_mass: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.policy, self.shape, self.prefill = policy, shape, prefill
        self.budgets = list(budgets)
        self.signals = dict(signals or {})
        self.missing_mass = missing_mass
        self.first_eviction = shape.prompt - 1 if prefill == "full" else 0
        self._heads = 1 if policy.scope == "layer" else shape.kv_heads
        protections = torch.tensor([protection(policy, budget) for budget in self.budgets], device=device)
        self._sinks, self._recent = protections[:, 0, None, None, None], protections[:, 1, None, None, None]
        self._budget = torch.tensor(self.budgets, device=device)[:, None, None]
        size = (len(self.budgets), len(shape.layers), self._heads, shape.length)
        self.leave = torch.full(size, NEVER, dtype=torch.int32, device=device)
        self._alive = torch.zeros(size, dtype=torch.bool, device=device)
        self._score = torch.zeros(size, dtype=dtype, device=device)
        self.evictions = torch.zeros(size[:-1], dtype=torch.int64, device=device)
        self._nan = torch.zeros((), dtype=torch.bool, device=device)
        self._memory: dict[str, Tensor] = {}
        self._reach = torch.tensor(shape.reach(), device=device)
        self._layers = torch.tensor(shape.layers, dtype=torch.int64, device=device)

    def step(self, t: int, row: Tensor) -> None:
        """Let query `t` see, be scored and evict.

        Parameters
        ----------
        t : int
            Its position; steps come in order from 0.
        row : Tensor
            Full-cache attention of the query, ``[L, H, t + 1]``; a leading ``R`` axis if it differs between runs.
        """
        n = t + 1
        self._alive[..., t] = True
        self._forget(t)
        visible = self._alive[..., :n]
        step = Step(
            t=t,
            kv_heads=self.shape.kv_heads,
            visible=visible,
            signals={name: values[..., :n] for name, values in self.signals.items()},
            live=self._live(t, row, visible) if "weights" in self.policy.needs else None,
            memory=self._memory,
            draw=lambda seed: draw(seed, self.shape.sequence, self._layers, self._heads, t),
        )
        self._score[..., :n] = self.policy.observe(step, self._score[..., :n])
        if self.policy.bounded and t >= self.first_eviction:
            self._evict(t)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``.

        Only steps that have been made can be asked for.
        """
        return self._mask(start, stop, shift=0)

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._mask(start, stop, shift=1)

    def check(self) -> None:
        """Raise ReplayError if what was done is not a result: nothing evicted, too much held, or a score of NaN."""
        if bool(self._nan):
            raise ReplayError(
                f"{self.policy.label} gave scores that are not numbers",
                "Check the policy, and the trace: kvscope info TRACE --verify",
            )
        if not self.policy.bounded:
            return
        for run, budget in enumerate(self.budgets):
            evicted = self.evictions[run] > 0  # [L, S]
            needed = (self._reach > budget)[:, None]
            if bool((needed & ~evicted).any()):
                raise ReplayError(
                    f"{self.policy.label} at {budget} keys evicted nothing from {self.shape.length} tokens",
                    "A replay that changes nothing is no result: check the policy.",
                )
            if budget >= self.shape.length and bool(evicted.any()):
                raise ReplayError(
                    f"{self.policy.label} at {budget} keys evicted although {self.shape.length} tokens fit",
                    "A budget of the whole sequence must equal the full cache: check the policy.",
                )

    def _mask(self, start: int, stop: int, shift: int) -> Tensor:
        steps = torch.arange(start, stop, device=self.leave.device)[:, None]
        keys = torch.arange(stop, device=self.leave.device)[None, :]
        leave = self.leave[..., None, :stop]
        mask = (keys <= steps) & (leave >= steps + shift)
        if self._heads != self.shape.kv_heads:
            mask = mask.expand(-1, -1, self.shape.kv_heads, -1, -1)
        return mask

    def _live(self, t: int, row: Tensor, visible: Tensor) -> Tensor:
        missing = None if self.missing_mass is None else self.missing_mass[..., t : t + 1]
        runs, layers, heads, n = visible.shape
        shown = visible[:, :, :, None, :]
        kept = row.view(-1, layers, heads, self.shape.heads // heads, n) * shown
        return renormalise(kept.reshape(runs, layers, self.shape.heads, n), missing)

    def _forget(self, t: int) -> None:
        """Drop what a sliding-window layer can no longer see; the model did that, not the policy."""
        for layer, window in enumerate(self.shape.windows):
            if window is not None and t >= window:
                gone = t - window
                self._alive[:, layer, :, gone] = False
                slot = self.leave[:, layer, :, gone]
                slot.copy_(torch.where(slot == NEVER, t - 1, slot))

    def _evict(self, t: int) -> None:
        n = t + 1
        score, alive = self._score[..., :n], self._alive[..., :n]
        self._nan |= torch.isnan(score).any()
        surplus = alive.sum(-1) - self._budget  # [R, L, S]
        most = int(surplus.max())
        if most <= 0:
            return
        key = torch.arange(n, device=alive.device)
        candidate = alive & (key >= self._sinks) & (key < n - self._recent)
        ranked = torch.where(candidate, score.clamp(max=torch.finfo(score.dtype).max), torch.inf)
        if most == 1:
            gone = ranked.argmin(-1, keepdim=True)  # the first, so the oldest, of equal scores
        else:
            gone = ranked.sort(dim=-1, stable=True).indices[..., :most]  # the same rule for many
        goes = torch.arange(most, device=gone.device) < surplus[..., None]
        mark = torch.zeros_like(candidate).scatter_(-1, gone, goes)
        alive &= ~mark
        self.leave[..., :n].masked_fill_(mark, t)
        self.evictions += surplus.clamp(min=0)


def renormalise(kept: Tensor, missing: Tensor | None = None) -> Tensor:
    """Return rows divided by their sum over the last axis, plus the mass a learned sink takes.

    A row without any mass stays zero: recorded weights can underflow.
    """
    total = kept.sum(-1, keepdim=True)
    if missing is not None:
        total = total + missing
    return kept / torch.where(total > 0, total, 1)


def draw(seed: int, sequence: int, layers: Tensor, heads: int, position: int) -> Tensor:
    """Return one uniform number in [0, 1) for each layer and head, float64 ``[L, heads]``.

    Counter-based (SplitMix64, Steele et al. 2014), so it does not depend on what else is drawn.
    """
    head = torch.arange(heads, dtype=torch.int64, device=layers.device)
    value = _mix(torch.tensor(seed, dtype=torch.int64, device=layers.device))
    for part in (torch.tensor(sequence, device=layers.device), layers[:, None], head[None, :]):
        value = _mix(value ^ part)
    value = _mix(value ^ position)
    return ((value >> 11) & (2**53 - 1)).to(torch.float64) / 2**53


def _mix(value: Tensor) -> Tensor:
    value = value + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def _shift(value: Tensor, by: int) -> Tensor:
    """Return a logical shift to the right; torch's own keeps the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def protection(policy: Policy, budget: int) -> tuple[int, int]:
    """Return how many first and last keys stay; raises UsageError if they alone exceed the budget."""
    kept = policy.protect(budget)
    if kept.sinks + kept.recent > budget:
        raise UsageError(
            f"{policy.label} protects {kept.sinks} first and {kept.recent} last keys, more than the budget of {budget}",
            "Raise the budget, or protect fewer keys.",
        )
    return kept.sinks, kept.recent
