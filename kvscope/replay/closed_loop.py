"""The closed loop: policies inside the model's attention, many in one teacher-forced pass.

A layer's keys and values never change once computed, and what a policy decides in a layer at step ``t`` depends on that
layer's rows up to ``t`` alone. So each layer computes all its queries, keys and values at once, steps every policy
through its rows, applies what they left visible, and passes on: the numbers of token-by-token decoding with a really
shortened cache, at the price of one forward pass. Runs ride along as a batch; row 0 is the full cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvscope.budget import Prefill
from kvscope.errors import ReplayError
from kvscope.metrics import Metric
from kvscope.model.attention_hook import Call, Kernel
from kvscope.replay.engine import Scan, Shape, renormalise
from kvscope.replay.plan import Plan
from kvscope.replay.score import Scorer

BLOCK_BYTES = 128 * 2**20  # of one tensor of rows for all runs


@dataclass(frozen=True)
class Batch:
    """Runs of one plan that ride together.

    Attributes
    ----------
    plan : Plan
        Their policy.
    budgets : list of int
        ``B`` of each.
    """

    plan: Plan
    budgets: list[int]


@dataclass(frozen=True)
class Text:
    """What the pass reads: prompt length, length, number of the sequence, and how many layers the model has."""

    prompt: int
    length: int
    sequence: int
    n_layers: int
    prefill: Prefill


Found = Callable[[int, int, Scan, Scorer], None]  # layer, number of the batch, its scan, its scorer


class ClosedLoop:
    """Answers the attention calls of one pass over a batch of ``1 + R`` equal sequences.

    Parameters
    ----------
    batches : sequence of Batch
        In the order of the rows ``1..R`` of the input.
    text : Text
        Sizes.
    metrics : sequence of Metric
        Fidelity of the closed loop: of what a row keeps of its own run's attention.
    found : callable
        Called for each layer and batch when its scan is done.

    Attributes
    ----------
    layers : list of int
        Layers that were really called, in order.
    """

    def __init__(self, batches: Sequence[Batch], text: Text, metrics: Sequence[Metric], found: Found) -> None:
        self.batches, self.text, self.metrics, self.found = list(batches), text, list(metrics), found
        self.layers: list[int] = []

    def __call__(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the output of one layer, ``[1 + R, T, H, D]``."""
        self.layers.append(call.layer)
        output = kernel()
        start = 1
        for number, batch in enumerate(self.batches):
            stop = start + len(batch.budgets)
            output[start:stop] = self._attend(_rows_of(call, start, stop), number, batch).to(output.dtype)
            start = stop
        return output

    def _attend(self, call: Call, number: int, batch: Batch) -> Tensor:
        length = call.query.shape[2]
        if length != self.text.length or call.key.shape[2] != length:
            raise ReplayError(
                f"layer {call.layer} got {length} queries on {call.key.shape[2]} keys, not the whole text at once",
                "The closed loop needs a model that attends to its whole input in one call.",
            )
        scan = self._scan(call, batch)
        first = self.text.prompt if self.text.prefill == "full" else 0
        scorer = Scorer(scan, self.metrics, first)
        size = max(1, BLOCK_BYTES // (4 * length * call.query.shape[0] * call.query.shape[1]))
        output = [self._block(call, scan, scorer, start, min(start + size, length)) for start in range(0, length, size)]
        scan.check()
        self.found(call.layer, number, scan, scorer)
        return torch.cat(output, 1)

    def _scan(self, call: Call, batch: Batch) -> Scan:
        shape = Shape(
            layers=(call.layer,),
            heads=call.query.shape[1],
            kv_heads=call.key.shape[1],
            prompt=self.text.prompt,
            length=self.text.length,
            sequence=self.text.sequence,
            windows=() if call.sliding_window is None else (call.sliding_window,),
            n_layers=self.text.n_layers,
        )
        missing = None
        if call.sinks is not None:
            missing = torch.zeros(
                call.query.shape[0], 1, *call.query.shape[1:3], dtype=call.exact, device=call.query.device
            )
        return Scan(
            batch.plan,
            batch.budgets,
            shape,
            self.text.prefill,
            {name: signal(call, name) for name in batch.plan.needs - {"weights", "full_weights"}},
            missing_mass=missing,
            device=call.query.device,
            dtype=call.exact,
        )

    def _block(self, call: Call, scan: Scan, scorer: Scorer, start: int, stop: int) -> Tensor:
        """Step and score one block of queries; returns its output ``[R, stop - start, H, D]``."""
        rows = call.rows(start, stop)[..., :stop]  # [R, H, b, stop]
        missing = None
        if scan.missing_mass is not None:
            missing = (1 - rows.sum(-1)).clamp(min=0)[:, None]  # [R, 1, H, b]
            scan.missing_mass[..., start:stop] = missing
        for t in range(start, stop):
            scan.step(t, rows[:, None, :, t - start, : t + 1])
        Scorer.score_block([scorer], rows[:, None], start, missing)
        visible = scan.visible(start, stop)[:, 0]  # [R, G, b, stop]
        runs, groups = visible.shape[:2]
        grouped = rows.view(runs, groups, -1, stop - start, stop) * visible[:, :, None]
        lost = None if missing is None else missing.view(runs, groups, -1, stop - start, 1)
        live = renormalise(grouped, lost)
        scan.release(stop)
        output = live @ call.value[:, :, None, :stop].to(live.dtype)  # [R, G, Q, b, D]
        return output.flatten(1, 2).transpose(1, 2)  # [R, b, H, D]


def signal(call: Call, name: str) -> Tensor:
    """Return a signal of a call for a scan, with its leading axis of runs and one layer."""
    if name in ("value_l1", "value_l2", "key_l2"):
        of = call.value if name.startswith("value") else call.key
        norm: Tensor = of.to(call.exact).norm(p=1 if name.endswith("l1") else 2, dim=-1)
        return norm[:, None]
    if name == "mean_query":
        return call.query.to(call.exact).mean(1)[:, None]
    return {"keys": call.key, "values": call.value, "queries": call.query}[name].to(call.exact)[:, None]


def _rows_of(call: Call, start: int, stop: int) -> Call:
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[start:stop]
    return replace(
        call, query=call.query[start:stop], key=call.key[start:stop], value=call.value[start:stop], mask=mask
    )
