"""The forward pass of the closed loop: policies inside the model's attention, many in one teacher-forced pass.

A layer's keys and values never change once computed, and a policy's decision in a layer at step ``t`` depends only on
that layer's rows up to ``t``. So each layer computes all its queries, keys and values at once, steps every policy
through its rows, and attends to the keys that these leave visible. The results are those of token-by-token decoding
with a physically shortened cache, at the cost of one forward pass. The runs are a batch; row 0 has the full cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from kvscope.closed_loop.compaction import Compacted
from kvscope.closed_loop.gates import margins, scores
from kvscope.closed_loop.merged import MergedSteps
from kvscope.closed_loop.pass_shape import PassShape, RunBatch
from kvscope.closed_loop.quantised import QuantisedCall
from kvscope.core.errors import ReplayError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import FILTER, GATE, SCORER
from kvscope.engine.quantised_steps import QuantisedSteps, kept_of
from kvscope.engine.rows import Block, Shape
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.gates.filters import load_filters
from kvscope.metrics import Metric
from kvscope.model.attention_hook import Call, Kernel
from kvscope.model.derotation import Derotation
from kvscope.model.image_check import forget_positions
from kvscope.model.kernel_rows import causal_rows

BLOCK_BYTES = 128 * 2**20  # limit for one tensor of rows for all runs of a batch
BLOCK_QUERIES = 128  # limit for the queries of a block, so that few of its weights are above the causal diagonal
# On a GPU a block costs launches rather than weights above the diagonal; with all metrics it needs ten tensors of rows.
GPU_BLOCK_QUERIES = 1024
GPU_BLOCK_SHARE = 1 / 32  # of the free memory, for one tensor of rows
GPU_BLOCK_BYTES = 2 * 2**30


Found = Callable[[int, int, CacheSimulation, MetricSeries], None]  # layer, number of the batch, and its results


class ClosedLoop:
    """Computes the attention of one pass over a batch of ``1 + R`` copies of a sequence.

    Parameters
    ----------
    batches : sequence of RunBatch
        Runs, in the order of the rows ``1..R`` of the input.
    text : PassShape
        Sizes.
    metrics : sequence of Metric
        Computed from each run's own full rows: the attention it would have in this layer without eviction.
    found : callable
        Called for each layer and batch when its simulation is complete.
    rotary : mapping of int to Derotation, optional
        Rotation of each layer with attention. If given, positions are compacted: the keys that a query sees are at
        0, 1, 2, ...
    unrotated : mapping of int to Derotation
        Rotation of each layer, for caches that quantise keys without their position.

    Attributes
    ----------
    layers : list of int
        Layers whose attention was called, in order.
    """

    def __init__(
        self,
        batches: Sequence[RunBatch],
        text: PassShape,
        metrics: Sequence[Metric],
        found: Found,
        rotary: Mapping[int, Derotation] | None = None,
        unrotated: Mapping[int, Derotation] = MappingProxyType({}),
    ) -> None:
        self.batches, self.text, self.metrics, self.found = list(batches), text, list(metrics), found
        self.rotary, self.unrotated = rotary, unrotated
        self.layers: list[int] = []
        self._owners: dict[tuple[int, int], CacheSimulation] = {}  # batch, layer whose cache others read

    def __call__(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the output of one layer, ``[1 + R, T, H, D]``."""
        self.layers.append(call.layer)
        require_whole(call, self.text)
        output = [kernel(1)]
        start = 1
        for number, batch in enumerate(self.batches):
            stop = start + len(batch.budgets)
            output.append(self._attend(rows_of(call, start, stop), number, batch).to(output[0].dtype))
            start = stop
        return torch.cat(output)

    def _attend(self, call: Call, number: int, batch: RunBatch) -> Tensor:
        decided = self._decided(call.layer, number, batch)
        simulation = simulation_of(call, batch, self.text) if decided is None else decided
        first = self.text.prompt if self.text.prefill == "full" else 0
        series = MetricSeries(simulation, self.metrics, first)
        scorer = BlockScorer([series], call.value[:, None], 2 * (call.key.shape[-1] + call.value.shape[-1]))
        size = block_size(call)
        if batch.cache is not None:
            quantised = QuantisedCall(call, batch.cache, self.text, self.unrotated)
            steps = QuantisedSteps(quantised, simulation, scorer if self.metrics else None, decides=decided is None)
            output = steps.attend(self.text.length, size)
            return self._finished(call, number, simulation, series, output, decides=decided is None)
        if batch.merge is not None:
            merged = MergedSteps(call, batch.merge, self.text, simulation, scorer if self.metrics else None)
            return self._finished(call, number, simulation, series, merged.attend(size), decides=True)
        compacted = None if self.rotary is None else Compacted(call, self.rotary[call.layer])
        output = []
        for start in range(0, self.text.length, size):
            stop = min(start + size, self.text.length)
            rows = causal_rows(call, start, stop)  # [R, H, b, stop]
            missing = self._missing(call, simulation, rows, start, stop)
            if compacted is None:
                if decided is None:
                    simulation.block(Block(rows[:, None], start, None if missing is None else missing[:, None]))
                output.append(_attended(call, simulation, rows, missing, start, stop))
            elif decided is None:
                output.append(compacted.attend(simulation, rows, start))
            else:
                output.append(compacted.follow(simulation, start, stop))
            if self.metrics:
                scorer.add(rows[:, None], start, None if missing is None else missing[:, None])
            simulation.release(stop)
        return self._finished(call, number, simulation, series, output, decides=decided is None)

    def _finished(
        self,
        call: Call,
        number: int,
        simulation: CacheSimulation,
        series: MetricSeries,
        output: list[Tensor],
        *,
        decides: bool,
    ) -> Tensor:
        """Check a complete simulation, give it to `found`, and return the output of its blocks together."""
        if decides:
            simulation.check()
        if call.layer in self.text.shared.values():
            self._owners[number, call.layer] = simulation
        self.found(call.layer, number, simulation, series)
        return torch.cat(output, 1)

    def _decided(self, layer: int, number: int, batch: RunBatch) -> CacheSimulation | None:
        """Return the finished simulation of the cache of another layer, if one is read; see `engine.shared_caches`."""
        if batch.plan.policy.traits.reads or layer not in self.text.shared:
            return None
        return self._owners[number, self.text.shared[layer]]

    @staticmethod
    def _missing(call: Call, simulation: CacheSimulation, rows: Tensor, start: int, stop: int) -> Tensor | None:
        """Return the attention mass of rows on a learned sink, ``[R, H, b]``, and write it to the simulation."""
        if call.sinks is None or simulation.inputs.missing_mass is None:
            return None
        missing = (1 - rows.sum(-1)).clamp(min=0)
        if simulation.shape.layers != (call.layer,):  # another layer's simulation, which is finished
            return missing
        simulation.inputs.missing_mass[:, 0, :, start:stop] = missing
        return missing


def _attended(
    call: Call, simulation: CacheSimulation, rows: Tensor, missing: Tensor | None, start: int, stop: int
) -> Tensor:
    """Return the output of a block of queries over their visible keys, ``[R, b, H, D]``."""
    kept, total = kept_of(simulation, rows, start, stop)
    total = total if missing is None else total + missing
    groups = call.value.shape[1]
    grouped = kept.view(len(kept), groups, -1, stop)  # [R, G, Q * b, stop]
    output = grouped @ call.value[:, :, :stop].to(rows.dtype)
    output = output.view(*rows.shape[:3], -1) / torch.where(total > 0, total, 1)[..., None]
    return output.transpose(1, 2)


def block_size(call: Call) -> int:
    """Return how many queries of a call are stepped at a time: what memory allows, up to a limit by the device."""
    runs, heads, length, _ = call.query.shape
    bytes_of_query = runs * heads * length * call.exact.itemsize
    if call.query.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(call.query.device)
        most, limit = min(GPU_BLOCK_BYTES, max(BLOCK_BYTES, int(free * GPU_BLOCK_SHARE))), GPU_BLOCK_QUERIES
    else:
        most, limit = BLOCK_BYTES, BLOCK_QUERIES
    return max(1, min(limit, most // bytes_of_query))


def require_whole(call: Call, text: PassShape) -> None:
    """Raise ReplayError unless a call attends to the whole text at once."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if queries != text.length or keys != queries:
        raise ReplayError(
            f"layer {call.layer} was called with {queries} queries on {keys} keys, not with the whole text at once",
            "Use a model that attends to its whole input in one call.",
        )


def simulation_of(call: Call, batch: RunBatch, text: PassShape) -> CacheSimulation:
    """Return the simulation of one layer for the runs of a batch; row ``r`` of `call` is run ``r``."""
    runs, heads, length, _ = call.query.shape
    sharing = text.deciding(batch.plan)
    shape = Shape(
        layers=(call.layer,),
        heads=heads,
        kv_heads=call.key.shape[1],
        prompt=text.prompt,
        length=text.length,
        sequence=text.sequence,
        windows=() if call.sliding_window is None else (call.sliding_window,),
        n_layers=len(sharing),
        places=(sharing.index(call.layer),) if sharing else (),
        chunks=() if call.chunk is None else (call.chunk,),
        kv_heads_of=text.deciding_heads(batch.plan),
    )
    missing = None
    if call.sinks is not None:
        missing = torch.zeros(runs, 1, heads, length, dtype=call.exact, device=call.query.device)
    return CacheSimulation(
        batch.plan,
        batch.budgets,
        shape,
        text.prefill,
        {name: signal(call, name, text) for name in sorted(batch.plan.needs - ROWS)},
        missing_mass=missing,
        allocator=batch.allocators.get(call.layer),
        device=call.query.device,
        dtype=call.exact,
    )


def signal(call: Call, name: str, text: PassShape) -> Tensor:
    """Return a signal of a call, with leading axes for the runs and the single layer.

    Raises
    ------
    ModelError
        If a gate needs the input of the layer and the attention module does not expose it.
    """
    if name.startswith(GATE):
        return margins(name.removeprefix(GATE), call, call.hidden, text.prompt)[:, None]
    if name.startswith(SCORER):
        return scores(name.removeprefix(SCORER), call)[:, None]
    if name in ("value_l1", "value_l2", "key_l2"):
        vectors = call.value if name.startswith("value") else call.key
        norm: Tensor = vectors.to(call.exact).norm(p=1 if name.endswith("l1") else 2, dim=-1)
        return norm[:, None]
    if name.startswith(FILTER):
        return load_filters(name.removeprefix(FILTER)).projections(call.layer, call.key).to(call.exact)[:, None]
    if name == "value_out_l1":
        return text.model.value_out_l1(call.layer, call.value.to(call.exact))[:, None]
    if name == "reconstruction":
        return text.model.reconstruction(text.sequence, call.layer, text.length, call.query.device)[None, None]
    if name == "token_kinds":
        kinds = text.model.token_kinds(text.sequence, text.length, call.query.device)
        return kinds.to(call.exact).expand(1, 1, call.key.shape[1], -1)
    if name == "rotary":
        return text.model.rotary[call.layer][None, None].to(call.query.device)
    if name == "mean_query":
        return call.query.to(call.exact).mean(1)[:, None]
    return {"keys": call.key, "values": call.value, "queries": call.query}[name].to(call.exact)[:, None]


def rows_of(call: Call, start: int, stop: int) -> Call:
    """Return a call with only rows `start` to `stop` - 1 of its batch."""
    mask = call.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[start:stop]
    return replace(
        call,
        query=call.query[start:stop],
        key=call.key[start:stop],
        value=call.value[start:stop],
        mask=mask,
        hidden=None if call.hidden is None else call.hidden[start:stop],
    )


def logits_of(
    model: CausalModel, ids: Tensor, keep: slice, beside: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """Return logits ``[batch, S, V]`` of the positions `keep` of ids ``[batch, T]``, from one pass without a cache.

    If the model supports it, logits of other positions are not computed. `keep` is a slice and not a tensor because
    the parts of a model may be on several devices. `beside` is what the model reads of the images of one sequence: its
    tensors have the images, or the sequence, along their first axis, and are repeated for each row of the batch.
    """
    forget_positions(model)
    more = {name: torch.cat([tensor] * len(ids)) for name, tensor in beside.items()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep, **more).logits  # type: ignore[no-any-return]
    logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits[:, keep]
