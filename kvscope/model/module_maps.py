"""Record attention rows as the model's own attention modules return them, for models that the registry does not reach.

With eager attention and ``output_attentions`` every attention module returns its rows. A hook on each module writes
them and puts an empty tensor in their place, so that a model never holds the rows of all its layers. Queries, keys and
values are not seen: such a trace has rows alone, and policies cannot run inside the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel, ModelConfig
from kvscope.model.named_windows import named_windows
from kvscope.model.obstacles import is_indexed, obstacle
from kvscope.model.pipeline import Pipeline
from kvscope.model.selfcheck import PROBE, TOLERANCE, AttentionFacts, latent_size, layer_count, plain_logits
from kvscope.model.shared_states import shared_states
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.writer import TraceWriter

WITHOUT_CACHE = frozenset({"conv", "linear_attention", "mamba", "recurrent"})  # types of layers without attention
LEAST = torch.tensor(2.0**-24, dtype=torch.float16)  # the least number in float16 above zero
Take = Callable[[int, Tensor], None]  # layer, its rows [1, H, q, k]


@dataclass(frozen=True)
class Source:
    """Where a model returns the rows of one layer.

    Attributes
    ----------
    layer : int
        Number of the layer.
    module : nn.Module
        The innermost module that returns them.
    place : int or None
        Their place in its output, or None if they are all of it.
    heads : int
        ``H``.
    sinks : bool
        Whether rows sum to less than one, since a learned sink takes part in the softmax.
    reach : int
        Keys from the oldest that a query gives weight to, to the query's own.
    """

    layer: int
    module: nn.Module
    place: int | None
    heads: int
    sinks: bool
    reach: int


def self_check_modules(model: CausalModel, ids: Tensor) -> AttentionFacts:
    """Return the facts of a model whose modules return their rows, checked on the first tokens of a prompt ``[1, P]``.

    Raises
    ------
    ModelError
        If it does not use eager attention, or no module returns rows that are causal and sum to at most one.
    """
    config = model.config.get_text_config(decoder=True)
    plain_logits(model, ids[:, :PROBE])
    found = sources(model, ids[:, :PROBE])
    sizes = {source.layer: LayerHeads(source.heads, _kv_heads(model, source), 0) for source in found}
    named = named_windows(config, layer_count(config))
    windows = {source.layer: _window(source, named[source.layer]) for source in found}
    return AttentionFacts(
        sizes=sizes,
        windows=windows,
        others=_others(type(model).__name__, config, windows),
        scaling=None,
        softcap=None,
        learned_sinks=any(source.sinks for source in found),
        sink_rows=_sink_rows(model, found),
        attention={},
        vector_dtype="float32",
        from_modules=True,
        latent_size=latent_size(model, ids[:, :PROBE], {layer: own.kv_heads for layer, own in sizes.items()}),
        indexed=is_indexed(model),
        shared=shared_states(model, ids[:, :PROBE]),
    )


def _sink_rows(model: CausalModel, found: Sequence[Source]) -> Literal["after", "before"] | None:
    """Return whether the modules return rows after or before a learned sink takes its share; None without sinks.

    A sink logit is a parameter that takes part in a softmax, after which rows sum to less than one. Some models compute
    the softmax without it, return its rows, and shrink the output instead.
    """
    if any(source.sinks for source in found):
        return "after"
    own = {name for source in found for name, _ in source.module.named_parameters(recurse=False)}
    return "before" if own & {"sinks", "sink"} else None


def _window(source: Source, named: int | None) -> int | None:
    """Return the window that a configuration names for a layer; None if the rows of the probe reach beyond it."""
    return None if named is not None and source.reach > named else named


def _others(name: str, config: ModelConfig, seen: Collection[int]) -> dict[int, str]:
    """Return the kind of each layer without attention; raises ModelError for one with attention but without rows."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = {}
    for layer in range(layer_count(config)):
        if layer in seen:
            continue
        others[layer] = kind = types[layer] if layer < len(types) else "unknown"
        if kind not in WITHOUT_CACHE:
            raise ModelError(
                f"the modules of layer {layer} of {name} return no rows over the tokens before a query",
                "Trace another model; kvscope models lists those that can be traced.",
            )
    return others


def _kv_heads(model: CausalModel, source: Source) -> int:
    """Return how many key/value heads a configuration names for a layer; raises ModelError if they cannot be shared."""
    config = model.config.get_text_config(decoder=True)
    differ = getattr(config, "is_heterogeneous", False)
    own = vars(config.per_layer_config[source.layer] if differ else config)  # attributes are of all layers
    if own.get("multi_query") and not own.get("new_decoder_architecture"):
        return 1
    named = own.get("num_key_value_heads") or own.get("num_kv_heads") or source.heads
    count = int(named[source.layer] if isinstance(named, (list, tuple)) else named)  # a list has one for each layer
    if source.heads % count:
        raise ModelError(
            f"{source.heads} query heads of layer {source.layer} of {type(model).__name__} do not share the {count} "
            "key/value heads of its configuration evenly",
            "Trace another model, and please report this one.",
        )
    return count


def sources(model: CausalModel, ids: Tensor) -> list[Source]:
    """Return where each layer's rows are, found in one pass over ids ``[1, n]``; raises ModelError if they are not."""
    found: list[tuple[str, Source]] = []

    def look(name: str, module: nn.Module, _: object, output: object) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        for place, part in enumerate(parts):
            if isinstance(part, Tensor) and _are_rows(part, ids.shape[1]):
                at = place if isinstance(output, tuple) else None
                sinks = float(part.detach().float().sum(-1).min()) < 1 - TOLERANCE
                found.append((name, Source(_number(name), module, at, part.shape[1], sinks, _reach(part))))

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    try:
        model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    inner = _innermost(found)
    name, numbers = type(model).__name__, [source.layer for source in inner]
    if not inner or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(layer_count_of(model))):
        raise ModelError(
            f"{obstacle(model) or name + ' cannot be observed'}, and its modules return no causal rows for each layer",
            "Trace another model; kvscope models lists those that can be traced.",
        )
    return sorted(inner, key=lambda source: source.layer)


def _reach(rows: Tensor) -> int:
    """Return how many keys back rows ``[1, H, n, n]`` have weight, the query's own included."""
    oldest = (rows[0] > 0).any(0).int().argmax(-1)  # [n], of each query
    return int((torch.arange(len(oldest), device=rows.device) - oldest).max()) + 1


def layer_count_of(model: CausalModel) -> int:
    """Return the number of layers of a model's language model."""
    return layer_count(model.config.get_text_config(decoder=True))


def _innermost(found: Sequence[tuple[str, Source]]) -> list[Source]:
    """Return the sources that are in no other's module; those with parts of their own come before a dropout."""
    whole = [(name, source) for name, source in found if list(source.module.children())] or list(found)
    return [source for name, source in whole if not any(other.startswith(f"{name}.") for other, _ in whole)]


def _number(name: str) -> int:
    """Return the last number in the path of a module: 3 for ``transformer.h.3.attn``; -1 if there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(numbers[-1]) if numbers else -1


def _are_rows(part: Tensor, count: int) -> bool:
    """Return whether a tensor ``[1, H, n, n]`` can be attention rows: no weight on later keys, sums of at most one."""
    if part.ndim != 4 or part.shape[0] != 1 or part.shape[2:] != (count, count) or not part.is_floating_point():
        return False
    part = part.detach()
    sums = part.float().sum(-1)
    causal = not bool(part.triu(1).any()) and bool((part >= 0).all())
    return (
        causal
        and bool((sums > 0).all())
        and float(sums.max()) <= 1 + max(TOLERANCE, torch.finfo(part.dtype).eps * count)
    )


@contextmanager
def observe_modules(found: Sequence[Source], take: Take) -> Iterator[None]:
    """Pass the rows of every call to `take`, and put an empty tensor in their place where that can be done."""

    def taken(source: Source, _module: nn.Module, _args: object, output: tuple[object, ...] | Tensor) -> object:
        rows = output if source.place is None else output[source.place]
        if not isinstance(rows, Tensor):
            raise ModelError(
                f"layer {source.layer} of {type(_module).__name__} returned no rows",
                'Load the model with attn_implementation="eager".',
            )
        take(source.layer, rows)
        if source.place is None or not isinstance(output, tuple):
            return output
        return (*output[: source.place], rows.new_empty(0), *output[source.place + 1 :])

    hooks = [source.module.register_forward_hook(partial(taken, source)) for source in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class MapRecorder:
    """Writes rows that modules return to a trace, one sequence at a time.

    Parameters
    ----------
    writer : TraceWriter
        Writes the blocks.
    layers : collection of int
        Layers to record.
    query_block : int
        Most queries whose rows are written at a time.
    heads : sequence of int
        Query heads to record; empty for all.
    query_stride : int
        Record every n-th row.
    indexed : bool
        Whether the keys with weight are those that the model chose, so that no weight may be rounded to zero.
    pipeline : Pipeline
        Writes blocks in threads.
    """

    def __init__(
        self,
        writer: TraceWriter,
        layers: Collection[int],
        query_block: int,
        *,
        heads: Sequence[int],
        query_stride: int,
        indexed: bool,
        pipeline: Pipeline,
    ) -> None:
        self.writer, self.query_block, self._selected = writer, query_block, frozenset(layers)
        self._heads, self._stride, self._put, self._indexed = list(heads), query_stride, pipeline.put, indexed
        self._seen: dict[int, int] = {}
        self._sequence = 0

    def begin(self, sequence: int, prompt: int = 0) -> None:
        """Start a sequence."""
        self._sequence, self._seen = sequence, dict.fromkeys(self._selected, 0)

    def end(self) -> None:
        """End the sequence; nothing waits to be written."""

    def __call__(self, layer: int, rows: Tensor) -> None:
        """Record the rows ``[1, H, q, k]`` of one call; the newest key is that of the last query."""
        if layer not in self._selected:
            return
        first, count = self._seen[layer], rows.shape[2]
        self._seen[layer] += count
        part = rows[0, self._heads] if self._heads else rows[0]
        part = nn.functional.pad(part, (first + count - part.shape[-1], 0))  # a window's cache holds the newest keys
        for start in range(0, count, self.query_block):
            stop = min(start + self.query_block, count)
            skipped = -(first + start + 1) % self._stride
            block = part[:, start + skipped : stop : self._stride, : first + stop].float()
            if block.shape[1]:
                write = partial(
                    self.writer.attention, layer, self._sequence, first + start + skipped, stride=self._stride
                )
                half = block.half()
                if self._indexed:
                    half = torch.where((half == 0) & (block > 0), LEAST, half)
                self._put(("attention", layer), write, {"row_sum": block.sum(-1), "rows": half})
