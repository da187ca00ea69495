"""Compile a recording: load the model, read the prompts, check everything and estimate the size, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.output import require_free
from kvscope.core.recording_options import BlockOptions, Sampling, StoreOptions, TextOptions
from kvscope.core.text_names import text_name
from kvscope.model.explain import memory_explained
from kvscope.model.header import header
from kvscope.model.image_check import check_images
from kvscope.model.loading import Loaded, load, model_name
from kvscope.model.module_maps import self_check_modules
from kvscope.model.obstacles import obstacle, refuse_encoder_decoder
from kvscope.model.outputs import output_projections
from kvscope.model.plan import RecordingPlan
from kvscope.model.prefill import chunk_size
from kvscope.model.prompt_files import PromptText, read_prompts, with_answers, with_images
from kvscope.model.prompts import Prompt, encode
from kvscope.model.rotary import rotary_records
from kvscope.model.selfcheck import PROBE, AttentionFacts, layer_count, self_check
from kvscope.trace.layer_records import RotaryRecord
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import AUTO, MAPS, MAPS_AND_VECTORS, STORES, TOP, parse_store
from kvscope.trace.space import estimate_layers, free_bytes, require_space

SMALL = 100_000_000  # bytes of a trace up to which queries, keys and values are stored too, unless a store is named
GATE = "gate.safetensors"  # gate file in a model's folder; where there is one, layer inputs are recorded by default


def compile_recording(
    source: ModelSource,
    prompts: Sequence[Path | str],
    output: OutputOptions,
    *,
    text: TextOptions = TextOptions(),  # noqa: B008  frozen
    store: StoreOptions = StoreOptions(),  # noqa: B008
    sampling: Sampling = Sampling(),  # noqa: B008
    blocks: BlockOptions = BlockOptions(),  # noqa: B008
) -> RecordingPlan:
    """Return a checked plan of a recording, with the model loaded, the prompts as tokens and the size estimated.

    Raises
    ------
    UsageError
        If a prompt is empty or longer than the context, a layer or head does not exist, or a setting is invalid.
    ModelError
        If the model cannot be loaded, its tokenizer or chat template fails, its attention cannot be observed, or the
        self-check fails.
    TraceError
        If the trace exists, or the disk has too little space.
    """
    _require_rows(store)
    texts = _read(prompts, text)
    require_free(output.path, force=output.force)
    loaded = load(source)
    refuse_encoder_decoder(loaded.model)
    encoded = tuple(encode(loaded, one, text) for one in texts)
    return compile_prompts(loaded, encoded, output, text=text, store=store, sampling=sampling, blocks=blocks)


def compile_prompts(
    loaded: Loaded,
    encoded: tuple[Prompt, ...],
    output: OutputOptions,
    *,
    text: TextOptions = TextOptions(),  # noqa: B008  frozen
    store: StoreOptions = StoreOptions(),  # noqa: B008
    sampling: Sampling = Sampling(),  # noqa: B008
    blocks: BlockOptions = BlockOptions(),  # noqa: B008
) -> RecordingPlan:
    """Return the plan of recording prompts that are tokens already; raises as `compile_recording`."""
    automatic = store.store == AUTO and store.query_stride == 1  # such a trace cannot be replayed
    store = _most(loaded, store)
    _require_rows(store)
    require_layers(loaded, store.layers)
    new = text.max_new_tokens
    lengths = [len(prompt.ids) + (new if prompt.forced is None else len(prompt.forced)) for prompt in encoded]
    with torch.inference_mode(), memory_explained(loaded.name):
        facts = _facts(loaded, encoded, store)
        longest = max(len(prompt.ids) + len(prompt.forced or []) for prompt in encoded)
        chunk = chunk_size(loaded, facts, longest, blocks.prefill_chunk, images=any(one.inputs for one in encoded))
        hidden = (Path(loaded.source) / GATE).is_file() and not facts.from_modules
        hidden = hidden if store.hidden is None else store.hidden
        layers = tuple(sorted(set(store.layers))) if store.layers else tuple(sorted(facts.windows))
        selected = replace(store, layers=layers, heads=heads_of(loaded, facts, layers, store.heads), hidden=hidden)
        known = header(
            loaded, facts, encoded, selected, sampling, seed=text.seed, command=output.command, prefill_chunk=chunk
        )
        sizes = _sizes(known, lengths, loaded.text_config.hidden_size)
        if automatic and known.store == MAPS_AND_VECTORS and sizes[known.store] > SMALL:
            selected = replace(selected, store=MAPS)
            known = replace(known, stored=[name for name in known.stored if not name.startswith("vectors:")], rotary=[])
    needed = sizes.pop(known.store)
    require_space(output.path, needed)
    return RecordingPlan(
        loaded=loaded,
        prompts=encoded,
        header=known,
        output=output,
        text=text,
        store=selected,
        sampling=sampling,
        query_block=blocks.query_block,
        tokens=sum(lengths),
        bytes=needed,
        free=free_bytes(output.path),
        others=sizes,
        projections=facts.projections,
        automatic=automatic,
    )


def _most(loaded: Loaded, store: StoreOptions) -> StoreOptions:
    """Return options with a store: where it is to be chosen, the one with all that a replay may need."""
    if store.store != AUTO:
        return store
    return replace(store, store=MAPS if obstacle(loaded.model) or store.query_stride > 1 else MAPS_AND_VECTORS)


def _read(prompts: Sequence[Path | str], text: TextOptions) -> list[PromptText]:
    """Return the prompts of files, with what is given beside a single one."""
    read = with_answers(read_prompts(prompts, text.continuation, text.field, text.template), text.answers)
    return with_images(read, text.images.names)


def _facts(loaded: Loaded, prompts: Sequence[Prompt], store: StoreOptions) -> AttentionFacts:
    """Return the facts of the model's attention; raises ModelError if it cannot be recorded, or not in this store."""
    ids = torch.tensor([prompts[0].text_ids], device=loaded.device)
    why = obstacle(loaded.model)
    if not why:
        facts = self_check(loaded.model, ids)
        check_images(loaded, prompts)
        has_vectors, has_images = (
            "vectors:queries" in STORES[parse_store(store.store)[0]],
            any(p.inputs for p in prompts),
        )
        rotary = _rotary(loaded, ids) if has_vectors and not has_images else []
        if store.reread and has_images:
            raise ModelError("a prompt with images cannot be repeated as tokens", "Record the trace without --reread.")
        projections = output_projections(loaded.model, ids[:, :PROBE]) if store.outputs else {}
        return replace(facts, rotary=rotary, projections=projections)
    if store.store != MAPS or store.hidden or store.outputs or store.reread:
        raise ModelError(
            f"{why}, so only the rows that its modules return can be recorded, not vectors or layer inputs",
            "Record the rows alone: --store maps, without --hidden, --outputs and --reread.",
        )
    return self_check_modules(loaded.model, ids)


def _rotary(loaded: Loaded, ids: torch.Tensor) -> list[RotaryRecord]:
    """Return the rotary embedding of the layers; nothing where a layer has none that numbers describe."""
    try:
        return rotary_records(loaded.model, ids[:, :1])
    except ModelError:
        return []


def default_output(source: ModelSource, prompts: Sequence[Path | str]) -> Path:
    """Return the default folder of a trace, ``traces/PROMPT-MODEL``."""
    stem = text_name(prompts[0]) if prompts else "trace"
    return Path("traces") / f"{stem}-{Path(model_name(source)).name}"


def _require_rows(store: StoreOptions) -> None:
    """Raise UsageError for an unknown store, or a query stride in a store without rows."""
    if store.store == AUTO:
        return
    kind, _ = parse_store(store.store)
    if store.query_stride > 1 and "maps" not in STORES[kind]:
        raise UsageError(
            f"store {store.store} cannot record every n-th row only", f"Use --query-stride with --store {MAPS}."
        )


def _sizes(known: TraceHeader, lengths: list[int], hidden: int) -> dict[str, int]:
    """Return the estimated bytes of each store for sequences of these lengths; `hidden` is a layer input's size."""
    inputs = tuple(name for name in ("hidden", "value_out_l1", "reconstruction") if name in known.stored)
    return {
        store: estimate_layers(
            [known.heads_of(layer) for layer in known.layers],
            lengths=lengths,
            stored=(*stored, *inputs),
            hidden=hidden,
            top=known.top or TOP,
            query_stride=known.query_stride,
            number_bytes=4 if known.vector_dtype == "float32" else 2,
        )
        for store, stored in STORES.items()
    }


def require_layers(loaded: Loaded, requested: Sequence[int] | None) -> None:
    """Raise UsageError if the model does not have one of the layers."""
    count = layer_count(loaded.text_config)
    for layer in sorted(requested or ()):
        if not 0 <= layer < count:
            raise UsageError(f"no layer {layer} in {loaded.name}", f"Choose from 0 to {count - 1}.")


def heads_of(
    loaded: Loaded, facts: AttentionFacts, layers: Sequence[int], requested: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the query heads of the layers to record; empty for all.

    Raises
    ------
    UsageError
        If the model does not have one, or only some of the heads that share keys and values are requested; if heads are
        requested of layers that differ in theirs.
    """
    selected = sorted(set(requested or ()))
    counts = {(own.heads, own.kv_heads): layer for layer, own in facts.sizes.items() if layer in layers}
    if not selected or not counts:
        return ()
    if len(counts) > 1:
        (heads, kv_heads), *_ = counts
        same = [layer for layer in layers if layer in facts.sizes and _counts(facts, layer) == (heads, kv_heads)]
        raise UsageError(
            f"the recorded layers of {loaded.name} differ in their heads, so head numbers cannot select heads in all "
            f"of them",
            f"Record all heads, or only layers that have the same: --layers {_listed(same)}",
        )
    ((heads, kv_heads),) = counts
    group = heads // kv_heads
    for head in selected:
        if not 0 <= head < heads:
            raise UsageError(f"no query head {head} in {loaded.name}", f"Choose from its heads, 0 to {heads - 1}.")
    whole = sorted({head // group * group + number for head in selected for number in range(group)})
    if whole != selected:
        raise UsageError(
            f"heads {_listed(selected)} split a group of {group} that shares keys and values in {loaded.name}",
            f"Record whole groups: --heads {_listed(whole)}",
        )
    return () if len(selected) == heads else tuple(selected)


def _counts(facts: AttentionFacts, layer: int) -> tuple[int, int]:
    return facts.sizes[layer].heads, facts.sizes[layer].kv_heads


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
