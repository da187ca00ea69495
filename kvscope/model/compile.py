"""From names of a model and prompts to a recording plan: everything is loaded, checked and measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvscope.core.errors import UsageError
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.output import require_free
from kvscope.core.recording_options import BlockOptions, Sampling, StoreOptions, TextOptions
from kvscope.model.attention_hook import require_registry
from kvscope.model.explain import memory_explained
from kvscope.model.header import header
from kvscope.model.loading import Loaded, load, model_name
from kvscope.model.plan import RecordingPlan
from kvscope.model.prefill import chunk_size
from kvscope.model.prompts import encode, read_prompts
from kvscope.model.selfcheck import AttentionFacts, self_check
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import MAPS, STORES, TOP, parse_store
from kvscope.trace.space import estimate_bytes, free_bytes, require_space

GATE = "gate.safetensors"  # file beside a model whose gates need its layer inputs


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
    """Return the plan of a recording: the model is loaded and checked, prompts are read, sizes are known.

    Raises
    ------
    UsageError
        An empty prompt, one that does not fit the context, an unknown layer, a bad setting.
    ModelError
        The model cannot be loaded or watched, or the self-check fails.
    TraceError
        The trace exists, or the disk cannot hold it.
    """
    _require_rows(store)
    texts = read_prompts(prompts, text.continuation)
    require_free(output.path, force=output.force)
    loaded = load(source)
    require_registry(loaded.model)
    made = tuple(encode(loaded, *one, chat=text.chat, max_new_tokens=text.max_new_tokens) for one in texts)
    layers = layers_of(loaded, store.layers)
    with torch.inference_mode(), memory_explained(loaded.name):
        facts = self_check(loaded.model, torch.tensor([made[0].ids], device=loaded.device))
        longest = max(len(prompt.ids) + len(prompt.forced or []) for prompt in made)
        chunk = chunk_size(loaded, facts, longest, blocks.prefill_chunk)
        hidden = (Path(loaded.source) / GATE).is_file() if store.hidden is None else store.hidden
        chosen = replace(store, layers=layers, heads=heads_of(loaded, facts, store.heads), hidden=hidden)
        known = header(
            loaded, facts, made, chosen, sampling, seed=text.seed, command=output.command, prefill_chunk=chunk
        )
    new = text.max_new_tokens
    lengths = [len(prompt.ids) + (new if prompt.forced is None else len(prompt.forced)) for prompt in made]
    sizes = _sizes(known, lengths, loaded.text_config.hidden_size)
    needed = sizes.pop(known.store)
    require_space(output.path, needed)
    return RecordingPlan(
        loaded=loaded,
        prompts=made,
        header=known,
        output=output,
        text=text,
        store=chosen,
        sampling=sampling,
        query_block=blocks.query_block,
        tokens=sum(lengths),
        bytes=needed,
        free=free_bytes(output.path),
        others=sizes,
    )


def default_output(source: ModelSource, prompts: Sequence[Path | str]) -> Path:
    """Return the folder of a trace that is not named: ``traces/PROMPT-MODEL``."""
    stem = Path(prompts[0]).stem if prompts else "trace"
    return Path("traces") / f"{stem}-{Path(model_name(source)).name}"


def _require_rows(store: StoreOptions) -> None:
    """Raise UsageError for an unknown store, or a stride over rows where no rows are stored."""
    kind, _ = parse_store(store.store)
    if store.query_stride > 1 and "maps" not in STORES[kind]:
        raise UsageError(f"store {store.store} has no every n-th row", f"Use --query-stride with --store {MAPS}.")


def _sizes(known: TraceHeader, lengths: list[int], hidden: int) -> dict[str, int]:
    """Return the bytes that each store takes about, of sequences of these lengths and layer inputs of this size."""
    inputs = ("hidden",) if "hidden" in known.stored else ()
    return {
        store: estimate_bytes(
            layers=len(known.layers),
            heads=known.heads,
            kv_heads=known.kv_heads,
            head_dim=known.head_dim,
            lengths=lengths,
            stored=(*stored, *inputs),
            hidden=hidden,
            top=known.top or TOP,
            query_stride=known.query_stride,
            number_bytes=2 if known.model.dtype in ("float16", "bfloat16") else 4,
        )
        for store, stored in STORES.items()
    }


def layers_of(loaded: Loaded, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers to record; raises UsageError if the model lacks one."""
    count = loaded.text_config.num_hidden_layers
    for layer in asked or []:
        if not 0 <= layer < count:
            raise UsageError(f"no layer {layer} in {loaded.name}", f"Its layers are 0 to {count - 1}.")
    return tuple(sorted(set(asked)) if asked else range(count))


def heads_of(loaded: Loaded, facts: AttentionFacts, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Return the query heads to record, none for all.

    Raises
    ------
    UsageError
        If the model lacks one, or heads that share keys and values are not all among them.
    """
    chosen, group = sorted(set(asked or ())), facts.heads // facts.kv_heads
    for head in chosen:
        if not 0 <= head < facts.heads:
            raise UsageError(f"no query head {head} in {loaded.name}", f"Its heads are 0 to {facts.heads - 1}.")
    whole = sorted({head // group * group + number for head in chosen for number in range(group)})
    if whole != chosen:
        raise UsageError(
            f"heads {_listed(chosen)} split a group of {group} that shares keys and values in {loaded.name}",
            f"Record whole groups: --heads {_listed(whole)}",
        )
    return () if len(chosen) == facts.heads else tuple(chosen)


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
