"""Steps of one layer with a quantised cache: rows, decisions, output and metrics, block by block."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvscope.engine.rows import Block
from kvscope.engine.scoring import BlockScorer
from kvscope.engine.simulation import CacheSimulation
from kvscope.kernels import available, triton_available
from kvscope.kernels.kept import kept_rows
from kvscope.metrics.coded import CodedRows
from kvscope.quantisation.layer import QuantisedLayer


class QuantisedAttention(Protocol):
    """One layer's attention, in both loops."""

    layer: QuantisedLayer

    @property
    def sinks(self) -> bool:
        """Whether the layer has learned sinks."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows over all earlier keys, each in the precision it has in the cache, ``[R, H, b, stop]``."""

    def whole_rows(self, start: int, stop: int) -> Tensor:
        """Return the same rows with all keys in full precision."""


class QuantisedSteps:
    """Steps the runs of a batch through one layer.

    Parameters
    ----------
    attention : QuantisedAttention
        Keys, values and rows.
    simulation : CacheSimulation
        The caches; with `decides` nothing is known of them yet, otherwise another layer has decided.
    scorer : BlockScorer or None
        Of its metrics, if there are any.
    decides : bool
        Whether this layer's rows decide what its cache holds.
    """

    def __init__(
        self, attention: QuantisedAttention, simulation: CacheSimulation, scorer: BlockScorer | None, *, decides: bool
    ) -> None:
        self._attention, self._simulation, self._scorer, self._decides = attention, simulation, scorer, decides

    def attend(self, length: int, size: int) -> list[Tensor]:
        """Return the outputs ``[R, b, H, D]`` of blocks of at most `size` queries, of so many in all."""
        outputs, start, layer = [], 0, self._attention.layer
        while start < length:
            stop = layer.stop(start, min(start + size, length))
            outputs.append(self._block(start, stop))
            held = self._simulation.held(stop - 1, stop)[:, 0, :, 0]
            layer.quantise(stop, held)
            self._simulation.release(stop)
            start = stop
        return outputs

    def _block(self, start: int, stop: int) -> Tensor:
        attention, simulation = self._attention, self._simulation
        rows = attention.rows(start, stop)
        missing = self._missing(rows)
        if self._decides:
            if missing is not None and simulation.inputs.missing_mass is not None:
                simulation.inputs.missing_mass[:, 0, :, start:stop] = missing
            simulation.block(Block(rows[:, None], start, None if missing is None else missing[:, None]))
        kept, total = kept_of(simulation, rows, start, stop)
        total = total if missing is None else total + missing
        live = kept / torch.where(total > 0, total, 1)[..., None]
        output = attention.layer.output(live, start)
        if self._scorer is not None:
            self._score(self._scorer, live, output, start)
        return output.transpose(1, 2)

    def _score(self, scorer: BlockScorer, live: Tensor, output: Tensor, start: int) -> None:
        stop, layer = live.shape[-1], self._attention.layer
        whole = self._attention.whole_rows(start, stop)
        missing = self._missing(whole)
        size = layer.bits(self._simulation.held(start, stop)[:, 0], start) / 8  # [R, G, b]
        each = size.repeat_interleave(live.shape[1] // size.shape[1], 1).to(live.dtype)
        coded = torch.stack(layer.coded(start, stop)).any(0).any(-1)
        scorer.add(
            whole[:, None],
            start,
            None if missing is None else missing[:, None],
            CodedRows(live[:, None], output[:, None], coded, each[:, None]),
        )

    def _missing(self, rows: Tensor) -> Tensor | None:
        """Return the attention mass of rows on a learned sink, ``[R, H, b]``."""
        return (1 - rows.sum(-1)).clamp(min=0) if self._attention.sinks else None


def kept_of(simulation: CacheSimulation, rows: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return a block of rows ``[R, H, b, stop]`` with zeros at keys that are not visible, and the mass that remains."""
    device, leave = rows.device.type, simulation.state.leave[:, 0]
    if not simulation.plan.policy.traits.reads:  # what a sparse reader sees is not what was not evicted
        if device == "cpu" and available():
            kept, total = kept_rows(rows.detach().numpy(), leave.numpy(), start)
            return torch.from_numpy(kept), torch.from_numpy(total)
        if device == "cuda" and triton_available():
            from kvscope.kernels import kept_triton  # loads triton, which only a GPU needs

            return kept_triton.kept_rows(rows.detach(), leave, start)
    visible = simulation.visible(start, stop)[:, 0]  # [R, G, b, stop]
    part = rows * visible.repeat_interleave(rows.shape[1] // visible.shape[1], 1)
    return part, part.sum(-1)
