"""Attention of the closed loop where evicted keys are merged into those that stay, step by step.

A merge changes keys and values that later queries read, so a live row is not a part of the full row: it is computed
from the keys that the cache has at the step. Policies see these rows. What a policy reads beside rows (norms, keys,
values) it reads of each token as it comes, before any merge.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvscope.closed_loop.pass_shape import PassShape
from kvscope.core.merge_scheme import MergeScheme
from kvscope.engine.draw import draws
from kvscope.engine.scoring import BlockScorer
from kvscope.engine.simulation import CacheSimulation
from kvscope.merging.layer import MergingLayer
from kvscope.metrics.coded import CodedRows
from kvscope.model.attention_hook import Call


def merging_of(
    scheme: MergeScheme, sequence: int, layer: int, size: tuple[int, int, int], exact: torch.dtype, cached: Tensor
) -> MergingLayer:
    """Return the merging of a layer for ``R`` runs, ``G`` heads and ``T`` tokens; `cached` is a tensor of its cache."""
    runs, heads, length = size
    device = cached.device
    numbers = torch.tensor([layer], dtype=torch.int64, device=device)
    drawn = draws(scheme.seed, sequence, numbers, heads, torch.arange(length, device=device))[0]  # [G, T]
    return MergingLayer(scheme, drawn.to(exact), runs, exact, cached.dtype)


class MergedSteps:
    """Steps the runs of a batch through one layer.

    Parameters
    ----------
    call : Call
        The attention call of the layer; its batch axis is the runs.
    scheme : MergeScheme
        How evicted keys are merged.
    text : PassShape
        Sizes.
    simulation : CacheSimulation
        The caches, of which nothing is known yet.
    scorer : BlockScorer or None
        Of the metrics, if there are any.
    """

    def __init__(
        self,
        call: Call,
        scheme: MergeScheme,
        text: PassShape,
        simulation: CacheSimulation,
        scorer: BlockScorer | None,
    ) -> None:
        self._call, self._simulation, self._scorer = call, simulation, scorer
        self._length = text.length
        self._key, self._value = (part.to(call.exact, copy=True) for part in (call.key, call.value))
        size = (len(call.key), call.key.shape[1], text.length)
        self._merging = merging_of(scheme, text.sequence, call.layer, size, call.exact, call.key)
        self._positions = torch.arange(text.length, device=call.key.device)

    def attend(self, size: int) -> list[Tensor]:
        """Return the outputs ``[R, b, H, D]`` of blocks of at most `size` queries, of the whole text."""
        outputs = []
        for start in range(0, self._length, size):
            stop = min(start + size, self._length)
            outputs.append(self._block(start, stop))
            self._simulation.release(stop)
        return outputs

    def _block(self, start: int, stop: int) -> Tensor:
        full = self._call.rows(start, stop, stop)  # [R, H, b, stop]
        missing = self._missing(full)
        live, output = torch.zeros_like(full) if self._scorer else full, []
        for t in range(start, stop):
            step = self._simulation.see(t)
            row = full[:, :, t - start, : t + 1]
            if self._simulation.occupancy.evicted:
                row = self._live_row(t)
            if self._scorer:
                live[:, :, t - start, : t + 1] = row
            lost = self._missing(row)
            if lost is not None and self._simulation.inputs.missing_mass is not None:
                self._simulation.inputs.missing_mass[:, 0, :, t] = lost
            self._simulation.attend(step, row[:, None])
            output.append(self._output(row))
            self._merging.observe(row)
            self._merge(t)
        together = torch.stack(output, 1)  # [R, b, H, D]
        if self._scorer is not None:
            self._score(self._scorer, full, missing, live, together.transpose(1, 2), start)
        return together

    def _live_row(self, t: int) -> Tensor:
        """Return the row of query `t` over the keys that it sees, as they are in the cache, ``[R, H, t + 1]``."""
        visible = self._simulation.visible(t, t + 1)[:, 0]  # [R, G, 1, t + 1]
        call = replace(self._call, key=self._key)
        logits = call.logits(t, t + 1, t + 1)  # [R, H, 1, t + 1]
        hidden = ~visible.repeat_interleave(logits.shape[1] // visible.shape[1], 1)
        return call.softmax(logits.masked_fill(hidden, -torch.inf))[:, :, 0]

    def _output(self, row: Tensor) -> Tensor:
        """Return a row times the values that the cache has, ``[R, H, D]``."""
        runs, heads, n = row.shape
        grouped = row.view(runs, self._value.shape[1], -1, n)  # [R, G, Q, n]
        return (grouped @ self._value[:, :, :n].to(row.dtype)).view(runs, heads, -1)

    def _merge(self, t: int) -> None:
        """Merge what the policy has evicted at the end of step `t` into what the next query sees."""
        if not self._simulation.inputs.evicts_after(t):
            return
        state, n = self._simulation.state, t + 1
        groups = self._key.shape[1]
        evicted = (state.leave[:, 0, :, :n] == t).expand(-1, groups, -1)
        if not bool(evicted.any()):
            return
        stays = state.alive[:, 0, :, :n].expand(-1, groups, -1) & (self._positions[:n] >= self._oldest(n))
        positions = self._positions[:n].expand(evicted.shape)
        self._merging.merge(self._key[:, :, :n], self._value[:, :, :n], positions, evicted, stays)

    def _oldest(self, t: int) -> int:
        """Return the first position that query `t` can attend to."""
        window, chunk = self._call.sliding_window, self._call.chunk
        return max(0 if window is None else t + 1 - window, 0 if chunk is None else t // chunk * chunk)

    def _score(
        self, scorer: BlockScorer, full: Tensor, missing: Tensor | None, live: Tensor, output: Tensor, start: int
    ) -> None:
        stop = live.shape[-1]
        held = self._simulation.held(start, stop)[:, 0].sum(-1)  # [R, G, b]
        size = held * float(2 * (self._key.shape[-1] + self._value.shape[-1]))
        each = size.repeat_interleave(live.shape[1] // size.shape[1], 1).to(live.dtype)
        merged = torch.zeros(stop - start, dtype=torch.bool, device=live.device)  # only steps after evictions differ
        given = None if missing is None else missing[:, None]
        scorer.add(full[:, None], start, given, CodedRows(live[:, None], output[:, None], merged, each[:, None]))

    def _missing(self, rows: Tensor) -> Tensor | None:
        """Return the attention mass of rows on a learned sink; None where there is none."""
        return None if self._call.sinks is None else (1 - rows.sum(-1)).clamp(min=0)
