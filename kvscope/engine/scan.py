"""The step that every policy goes through: see, score, evict.

One `Scan` steps one policy under several budgets over a group of layers of one sequence. Tensors carry ``R`` runs
(budgets), ``L`` layers, ``S`` deciding heads (``G`` key/value heads, or 1 where the layer decides as one) and key
positions. The same scan serves recorded rows (open loop) and rows that are computed as it goes (closed loop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.core.options import Prefill
from kvscope.core.residency import NEVER, ResidencyIntervals
from kvscope.engine.allocation import ALLOCATORS, Allocator, Request
from kvscope.engine.draw import draw, draw_row
from kvscope.engine.plan import EvictionPlan, protection
from kvscope.engine.residency import ReadLog
from kvscope.engine.rows import Block, Shape, renormalise
from kvscope.engine.threads import few_threads
from kvscope.kernels import available
from kvscope.kernels.scan import step_block
from kvscope.policies.base import Policy, Step, recurrence_of

VECTORS = ("keys", "values", "queries")  # signals [L, heads, T, D]; all others are [L, ., T] or [L, T, D]
PER_QUERY = ("queries", "mean_query")  # of which the current query alone is shown


class Scan:
    """One policy under several budgets, stepped over a group of layers.

    Parameters
    ----------
    policy : Policy or Plan
        What scores the keys; a plan says when it evicts and how its budget is shared out, a bare policy goes as
        published.
    budgets : sequence of int
        ``B`` of each run, in keys per key/value head.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        Whether the prompt's rows see everything and the choice is made once at its end, or eviction starts when the
        cache first exceeds the budget.
    signals : mapping of str to Tensor
        What the policy needs beside the weights: norms ``[L, G, T]``, ``keys`` and ``values`` ``[L, G, T, D]``,
        ``queries`` ``[L, H, T, D]``, ``mean_query`` ``[L, T, D]``; with a leading axis ``R`` where runs differ.
    missing_mass : Tensor or None
        ``[L, H, T]``: what a learned sink takes from each row; the live row is divided by kept mass plus this.
    allocator : Allocator or None
        What shares out the budget; by default that of the plan.
    dtype : torch.dtype
        Of scores.

    Attributes
    ----------
    leave : Tensor
        int32 ``[R, L, S, T]``: first step at which the key is gone, `NEVER` if it stays. A key enters at its position.
    evictions : Tensor
        int64 ``[R, L, S]``: keys that the policy evicted (what a sliding-window layer forgets is not counted); for a
        sparse reader, keys that it left unread, summed over steps.
    budget : Tensor
        int64 ``[R, L, S]``: keys that each deciding head may hold.

    Notes
    -----
    Nothing is checked here: `kvscope.engine.feasible` has said that plan, budgets and prefill go together.
    """

    def __init__(
        self,
        policy: Policy | EvictionPlan,
        budgets: Sequence[int],
        shape: Shape,
        prefill: Prefill = Prefill.full,
        signals: Mapping[str, Tensor] | None = None,
        *,
        missing_mass: Tensor | None = None,
        allocator: Allocator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.plan = policy if isinstance(policy, EvictionPlan) else EvictionPlan.published(policy)
        self.policy, self.traits = self.plan.policy, self.plan.policy.traits
        self.shape, self.prefill, self.budgets = shape, prefill, list(budgets)
        self.signals = {name: _with_runs(name, value) for name, value in (signals or {}).items()}
        self.missing_mass = missing_mass
        self.first_eviction = shape.prompt - 1 if prefill == "full" else 0
        self._heads = 1 if self.traits.scope == "layer" else shape.kv_heads
        kept = torch.tensor([protection(self.policy, budget, shape.prompt) for budget in self.budgets], device=device)
        self._sinks, self._recent = kept[:, 0, None, None, None], kept[:, 1, None, None, None]
        size = (len(self.budgets), len(shape.layers), self._heads, shape.length)
        self.leave = torch.full(size, NEVER, dtype=torch.int32, device=device)
        self._alive = torch.zeros(size, dtype=torch.bool, device=device)
        self._score = torch.zeros(size, dtype=dtype, device=device)
        self.evictions = torch.zeros(size[:-1], dtype=torch.int64, device=device)
        self._count = torch.zeros_like(self.evictions)  # of keys that are alive
        self._nan = torch.zeros((), dtype=torch.bool, device=device)
        self._memory: dict[str, Any] = {}
        self._reach = torch.tensor(shape.reach(), device=device)
        windows = shape.windows or (None,) * len(shape.layers)
        self._windows = torch.tensor([window or 0 for window in windows], dtype=torch.int64, device=device)
        self._layers = torch.tensor(shape.layers, dtype=torch.int64, device=device)
        self._reads = ReadLog(size, device) if self.traits.reads else None
        self._pressed = torch.zeros((), dtype=torch.int64, device=device)  # most keys that met an eviction
        self._allocator = allocator or ALLOCATORS.get(self.plan.allocate)()
        self._request = Request(
            budget=torch.tensor(self.budgets, device=device),
            fixed=kept.sum(1),
            layers=self._layers,
            n_layers=shape.n_layers or len(shape.layers),
            heads=self._heads,
            prompt=shape.prompt if prefill == "full" else shape.length,
        )
        start = self._allocator if self._allocator.when == "start" else ALLOCATORS.get("uniform")()
        self.budget = start.share(self._request)
        self._needs = self.plan.needs
        self._rule = recurrence_of(self.policy) if self._compiles() else None

    def block(self, block: Block) -> None:
        """Let all queries of a block see, be scored and evict, in order: `step` for each, compiled where it can be."""
        if self._rule is not None and block.rows.device.type == "cpu":
            self._step_compiled(block)
            return
        largest = self._score.numel() * self.shape.heads // self._heads
        with few_threads(largest):
            for t in range(block.start, block.start + block.rows.shape[-2]):
                whole = block.whole(t) if t <= self.first_eviction else None
                self.step(t, block.row(t), whole)

    def step(self, t: int, row: Tensor, whole: Tensor | None = None) -> None:
        """Let query `t` see, be scored and evict.

        Parameters
        ----------
        t : int
            Its position; steps come in order from 0.
        row : Tensor
            Full-cache attention of the query, ``[L, H, t + 1]``; a leading ``R`` axis if it differs between runs.
        whole : Tensor, optional
            The same divided by its sum, as `renormalise` does, where nothing has been evicted yet.
        """
        row = row if row.ndim == 4 else row[None]
        step = self.see(t, row if self.traits.clairvoyant else None)
        self.attend(step, row, whole)

    def see(self, t: int, row: Tensor | None = None) -> Step:
        """Return what query `t` sees: the first half of a step, before its row is known to any but a clairvoyant."""
        n = t + 1
        self._alive[..., t] = True
        self._count += 1
        self._forget(t)
        step = Step(
            t=t,
            prompt=self.shape.prompt,
            length=self.shape.length,
            kv_heads=self.shape.kv_heads,
            layers=self._layers,
            budget=self.budget,
            budgets=self.budgets,
            compresses=self.plan.compresses(t, self.shape.prompt, self.prefill),
            visible=self._alive[..., :n],
            signals={name: _until(name, values, t) for name, values in self.signals.items()},
            live=None,
            memory=self._memory,
            draw=lambda seed: draw(seed, self.shape.sequence, self._layers, self._heads, t),
            draw_row=lambda seed: draw_row(seed, self.shape.sequence, self._layers, self.shape.heads, t),
        )
        if row is not None:
            step.signals["full_weights"] = row
        if self._reads is not None:
            if t > self.first_eviction:
                step = replace(step, visible=self.policy.read(step) & step.visible)
            self._reads.add(t, step.visible.expand(self._alive[..., :n].shape))
            self.evictions += (self._alive[..., :n] & ~step.visible).sum(-1)
        return step

    def attend(self, step: Step, row: Tensor, whole: Tensor | None = None) -> None:
        """Score and evict, now that the row is known: the second half of a step."""
        n = step.t + 1
        row = row if row.ndim == 4 else row[None]
        if "weights" in self._needs:
            step.live = (
                self._live(step, row) if whole is None else self._rounded(whole.expand(len(self.budgets), -1, -1, -1))
            )
        if "full_weights" in self._needs:
            step.signals["full_weights"] = row
        score = self.policy.observe(step, self._score[..., :n])
        self._score[..., :n] = self._round(score, step.t)
        if self._allocator.when == "prompt" and self.prefill == "full" and step.t < self.shape.prompt:
            self._allocate(step)
        if step.compresses and not self.traits.reads:
            self._evict(step.t)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``.

        Only steps that have been made can be asked for, and of a sparse reader only those not `release`d.
        """
        if self._reads is not None:
            return self._per_head(self._reads.masks(start, stop))
        return self._mask(start, stop, shift=0)

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._mask(start, stop, shift=1)

    def release(self, stop: int) -> None:
        """Forget what is needed only to tell what steps before `stop` saw."""
        if self._reads is not None:
            self._reads.forget_before(stop)

    def residency(self, run: int, layer: int) -> ResidencyIntervals:
        """Return when keys were held in one run and one layer of the group; of a sparse reader, when they were read."""
        if self._reads is not None:
            return self._reads.residency(run, layer, self.shape.kv_heads)
        leave = self.leave[run, layer].expand(self.shape.kv_heads, -1)
        return ResidencyIntervals.from_eviction_steps(leave.cpu().numpy())

    def check(self) -> None:
        """Raise ReplayError if what was done is not a result: nothing evicted, too much held, or a score of NaN."""
        label = self.policy.label
        if bool(self._nan):
            raise ReplayError(
                f"{label} gave scores that are not numbers",
                "Check the policy, and the trace: kvscope info TRACE --verify",
            )
        if not self.traits.bounded or self.traits.phase == "none":
            return
        pressed = torch.minimum(self._reach, self._pressed)
        for run, budget in enumerate(self.budgets):
            evicted = self.evictions[run] > 0  # [L, S]
            needed = pressed[:, None] > self.budget[run]
            if not self.traits.reads and bool((needed & ~evicted).any()):  # a reader may well read all it has
                raise ReplayError(
                    f"{label} at {budget} keys evicted nothing from {self.shape.length} tokens",
                    "A replay that changes nothing is no result: check the policy.",
                )
            if budget >= self.shape.length and bool(evicted.any()):
                raise ReplayError(
                    f"{label} at {budget} keys evicted although {self.shape.length} tokens fit",
                    "A budget of the whole sequence must equal the full cache: check the policy.",
                )

    def _mask(self, start: int, stop: int, shift: int) -> Tensor:
        steps = torch.arange(start, stop, device=self.leave.device)[:, None]
        keys = torch.arange(stop, device=self.leave.device)[None, :]
        leave = self.leave[..., None, :stop]
        return self._per_head((keys <= steps) & (leave >= steps + shift))

    def _per_head(self, mask: Tensor) -> Tensor:
        return mask if self._heads == self.shape.kv_heads else mask.expand(-1, -1, self.shape.kv_heads, -1, -1)

    def _live(self, step: Step, row: Tensor) -> Tensor:
        missing = None if self.missing_mass is None else self.missing_mass[..., step.t : step.t + 1]
        runs, layers, heads, n = self._alive[..., : step.t + 1].shape
        kept = row.view(-1, layers, heads, self.shape.heads // heads, n) * step.visible[:, :, :, None, :]
        return self._rounded(
            renormalise(kept.expand(runs, -1, -1, -1, -1).reshape(runs, layers, self.shape.heads, n), missing)
        )

    def _rounded(self, live: Tensor) -> Tensor:
        return live if self.plan.accumulate is None else live.to(self.plan.accumulate).to(live.dtype)

    def _compiles(self) -> bool:
        """Return whether a kernel may step this: what it does not know of stays with torch."""
        return (
            available()
            and self.traits.bounded
            and not self.traits.reads
            and self.plan.accumulate is None
            and self._allocator.when == "start"
        )

    def _step_compiled(self, block: Block) -> None:
        assert self._rule is not None
        rows, shape = block.rows, self.shape
        steps = range(block.start, block.start + rows.shape[-2])
        evicts = np.array([self.plan.compresses(t, shape.prompt, self.prefill) for t in steps])
        state = (self._alive, self._score, self.leave, self._count, self.evictions)
        limits = (self.budget, self._sinks.flatten(), self._recent.flatten(), self._windows)
        scale = None if self._rule.scale is None else self.signals[self._rule.scale]
        self._nan |= step_block(
            self._rule.weights,
            self._rule.decay,
            tuple(tensor.numpy() for tensor in state),
            tuple(tensor.numpy() for tensor in limits),
            (rows if rows.ndim == 5 else rows[None]).detach().contiguous().numpy(),
            block.start,
            evicts,
            missing=None if self.missing_mass is None else _with_runs("missing", self.missing_mass).detach().numpy(),
            scale=None if scale is None else scale.detach().contiguous().numpy(),
        )
        if evicts.any():
            self._pressed.fill_(steps[int(evicts.nonzero()[0][-1])] + 1)

    def _round(self, score: Tensor, t: int) -> Tensor:
        """Round sums as half-precision code does: the prompt's sum once, at its end, and then at every step."""
        if self.plan.accumulate is None or t < self.first_eviction:
            return score
        return score.to(self.plan.accumulate).to(score.dtype)

    def _allocate(self, step: Step) -> None:
        self._allocator.observe(step, self._request.memory)
        if step.t == self.shape.prompt - 1:
            n = step.t + 1
            self._request.score = self._score[..., :n].masked_fill(~self._candidates(n), -torch.inf)
            self.budget = self._allocator.share(self._request).to(torch.int64)
            self._request.score = None
            self._request.memory.clear()

    def _candidates(self, n: int) -> Tensor:
        key = torch.arange(n, device=self._alive.device)
        return self._alive[..., :n] & (key >= self._sinks) & (key < n - self._recent)

    def _forget(self, t: int) -> None:
        """Drop what a sliding-window layer can no longer see; the model did that, not the policy."""
        for layer, window in enumerate(self.shape.windows):
            if window is not None and t >= window:
                gone = t - window
                self._count[:, layer] -= self._alive[:, layer, :, gone].to(torch.int64)
                self._alive[:, layer, :, gone] = False
                slot = self.leave[:, layer, :, gone]
                slot.copy_(torch.where(slot == NEVER, t - 1, slot))

    def _evict(self, t: int) -> None:
        n = t + 1
        score, alive = self._score[..., :n], self._alive[..., :n]
        self._nan |= torch.isnan(score).any()
        if not self.traits.bounded:
            self._drop(alive & (score == -torch.inf), t)
            return
        self._pressed.fill_(n)
        surplus = self._count - self.budget  # [R, L, S]
        most = int(surplus.max())
        if most <= 0:
            return
        ranked = torch.where(self._candidates(n), score.clamp(max=torch.finfo(score.dtype).max), torch.inf)
        if most == 1:
            gone = ranked.argmin(-1, keepdim=True)  # the first, so the oldest, of equal scores
        else:
            gone = ranked.sort(dim=-1, stable=True).indices[..., :most]  # the same rule for many
        goes = torch.arange(most, device=gone.device) < surplus[..., None]
        leave = self.leave[..., :n]
        alive.scatter_(-1, gone, alive.gather(-1, gone) & ~goes)
        leave.scatter_(-1, gone, torch.where(goes, t, leave.gather(-1, gone)))
        self._note(goes.sum(-1))

    def _drop(self, mark: Tensor, t: int) -> None:
        self._alive[..., : t + 1] &= ~mark
        self.leave[..., : t + 1].masked_fill_(mark, t)
        self._note(mark.sum(-1))

    def _note(self, evicted: Tensor) -> None:
        self._count -= evicted
        self.evictions += evicted


def _with_runs(name: str, value: Tensor) -> Tensor:
    """Return a signal with its leading axis of runs: 1 where all runs share it."""
    own = 4 if name in VECTORS else 3
    return value if value.ndim > own else value[None]


def _until(name: str, values: Tensor, t: int) -> Tensor:
    """Return what of a signal exists at step `t`."""
    if name in PER_QUERY:
        return values[..., t, :]
    return values[..., : t + 1, :] if name in VECTORS else values[..., : t + 1]
