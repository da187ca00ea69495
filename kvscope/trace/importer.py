"""Import attention maps that were captured elsewhere as a trace; every row is checked first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.core.output import checksum
from kvscope.core.text_files import read_text, require_whole
from kvscope.core.version import versions
from kvscope.trace.blocks import Array
from kvscope.trace.derive import cosines, norms
from kvscope.trace.import_axes import PER_KEY, arrange
from kvscope.trace.import_checks import OF_KEYS, check_arrays
from kvscope.trace.import_files import Captured, read_captured
from kvscope.trace.import_sinks import leave_share, sink_rows
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.schema import VECTORS
from kvscope.trace.space import estimate_bytes, require_space
from kvscope.trace.writer import TraceWriter

BLOCK = 256  # rows written at a time


def import_maps(
    source: Path,
    prompt: str | None,
    output: Path,
    *,
    prompt_length: int | None = None,
    axes: str | None = None,
    kv_heads: int | None = None,
    learned_sinks: bool = False,
    force: bool = False,
) -> Trace:
    """Write a trace from the attention arrays in a file, and return it.

    Parameters
    ----------
    source : Path
        ``.npz``, ``.npy``, ``.safetensors`` or ``.pt`` with ``attention`` ``[L, H, T, T]`` or ``[S, L, H, T, T]``,
        or ``attentions`` ``[L, S, H, T, T]`` or as transformers returns them, and optionally ``value_l1``,
        ``value_l2``, ``key_l2`` ``[L, G, T]``, ``keys``, ``values`` ``[L, G, T, D]``, ``queries`` ``[L, H, T, D]``,
        ``sink_mass`` ``[L, H, T]``, ``tokens`` ``[T]`` (ids or texts), ``prompt_length``,
        ``attention_mask`` ``[T]``, whose padding is removed; with ``S`` where attention has it.
    prompt : str, optional
        The prompt, as text or as the path of a text file.
    output : Path
        Folder of the trace.
    prompt_length : int, optional
        ``P``. Without it, and without an array of that name, the whole sequence is the prompt, and the trace can be
        replayed only with streaming prefill.
    axes : str, optional
        Axes of attention, such as ``LBHTT``: see `kvscope.trace.import_axes.arrange`.
    kv_heads : int, optional
        ``G``, if no array shows it; by default every query head has its own keys and values.
    learned_sinks : bool
        Whether the model has learned sinks. Rows that sum to one are then rows before a sink takes its share.
    force : bool
        Whether to replace an existing trace.

    Raises
    ------
    UsageError
        If the file cannot be read, or an array has the wrong shape.
    TraceError
        If a row is not causal, not finite, negative, or does not sum to one; the message says which.
    """
    source = Path(source)
    found = read_captured(source)
    model = ModelRecord(id=f"imported from {source.name}", sha256=checksum(source))
    options = ImportOptions(prompt, prompt_length, axes, kv_heads, learned_sinks)
    return import_arrays(found, model, output, options, force=force)


@dataclass(frozen=True)
class ImportOptions:
    """What arrays do not say, as parameters of `import_maps`."""

    prompt: str | None = None
    prompt_length: int | None = None
    axes: str | None = None
    kv_heads: int | None = None
    learned_sinks: bool = False


def import_arrays(
    found: Mapping[str, Captured],
    model: ModelRecord,
    output: Path,
    options: ImportOptions,
    *,
    force: bool = False,
    notes: Sequence[str] = (),
) -> Trace:
    """Return a trace of arrays by name, as `read_captured` returns them; raises as `import_maps`.

    The trace stores `notes` with what is assumed.
    """
    text, captured = _prompt(options.prompt), arrange(found, options.axes, options.prompt_length)
    groups = check_arrays(captured.sequences, options.kv_heads, options.learned_sinks)
    for arrays in captured.sequences:
        _derive(arrays)
        leave_share(arrays)
    records, first = [_lengths(arrays) for arrays in captured.sequences], captured.sequences[0]
    sinks = sink_rows(captured.sequences, options.learned_sinks)
    assumed = [*notes, *captured.assumed, *_assumed(first, options.kv_heads, sinks)]
    header = _header(model, first, groups, sinks, text, assumed)
    require_space(output, _bytes(header, records))
    with TraceWriter(output, header, force=force) as writer:
        for number, (arrays, record) in enumerate(zip(captured.sequences, records, strict=True)):
            _write(writer, number, arrays, record.prompt)
        writer.finish(records)
    return open_trace(output)


def _bytes(header: TraceHeader, sequences: Sequence[SequenceRecord]) -> int:
    """Return the estimated bytes of a trace."""
    return estimate_bytes(
        layers=len(header.layers),
        heads=header.heads,
        kv_heads=header.kv_heads,
        head_dim=header.head_dim,
        lengths=[sequence.length for sequence in sequences],
        stored=header.stored,
    )


def _header(
    model: ModelRecord,
    arrays: Mapping[str, Array],
    groups: int,
    sinks: Literal["after", "before"] | None,
    prompt: PromptRecord,
    assumed: list[str],
) -> TraceHeader:
    """Return the header of a trace of checked arrays, with `groups` key/value heads."""
    _, layers, heads, _, _ = arrays["attention"].shape
    return TraceHeader(
        source="import",
        protocol="import",
        model=model,
        layers=list(range(layers)),
        n_layers=layers,
        heads=heads,
        kv_heads=groups,
        head_dim=next((arrays[name].shape[-1] for name in VECTORS if name in arrays), 0),
        layer_types=["full"] * layers,
        sliding_window=[None] * layers,
        learned_sinks=sinks == "after",
        sink_rows=sinks,
        stored=_stored(arrays),
        prompts=[prompt],
        assumed=assumed,
        versions=versions("numpy"),
    )


def _derive(arrays: dict[str, Array]) -> None:
    """Add the norms and cosines of the vectors, unless the file contains them."""
    if "values" in arrays:
        values = arrays["values"].astype(np.float32)
        arrays.setdefault("value_l1", norms(values, 1).astype(np.float32))
        arrays.setdefault("value_l2", norms(values, 2).astype(np.float32))
    if "keys" in arrays:
        keys = arrays["keys"].astype(np.float32)
        arrays.setdefault("key_l2", norms(keys, 2).astype(np.float32))
        similarity = [cosines(key) for key in keys.reshape(-1, *keys.shape[-2:])]
        arrays["similarity"] = np.stack(similarity).reshape(*keys.shape[:-1], keys.shape[-2])


def _stored(arrays: Mapping[str, Array]) -> list[str]:
    stored = ["maps"]
    stored += [name for name in ("value_l1", "value_l2") if name in arrays]
    stored += ["key_l2"] if "key_l2" in arrays else []
    stored += ["similarity"] if "similarity" in arrays else []
    stored += ["queries"] if "queries" in arrays else []
    return stored + [f"vectors:{name}" for name in VECTORS if name in arrays]


def _lengths(arrays: Mapping[str, Array]) -> SequenceRecord:
    """Return the lengths of a sequence; raise UsageError for a prompt that is longer."""
    length = arrays["attention"].shape[-1]
    prompt = int(arrays["prompt_length"][0]) if "prompt_length" in arrays else length
    if not 1 <= prompt <= length:
        raise UsageError(f"prompt_length={prompt} does not fit {length} tokens", "Use 1 to the number of tokens.")
    return SequenceRecord(prompt, length, forced=True)


def _assumed(arrays: Mapping[str, Array], kv_heads: int | None, sinks: str | None) -> list[str]:
    """Return what is assumed about keys, prompt and rows, where neither the file nor the user says it."""
    lines: list[str] = []
    if kv_heads is None and not any(name in arrays for name in OF_KEYS):
        lines.append("each query head has keys and values of its own; otherwise give --kv-heads")
    if "prompt_length" not in arrays:
        lines.append("the whole sequence is the prompt; otherwise give --prompt-length")
    if sinks == "before":
        lines.append("the rows are those before learned sinks take their share, since they sum to one")
    return lines


def _prompt(prompt: str | None) -> PromptRecord:
    """Return the record of a prompt; raises UsageError for a number, which is a length by mistake."""
    if prompt is None:
        return PromptRecord()
    require_whole("--prompt", prompt)
    file = Path(prompt) if len(prompt) < 4096 and "\n" not in prompt else None
    if file is not None and file.is_file():
        text = read_text(file)
        return PromptRecord(file=str(file), text=text, sha256=hashlib.sha256(text.encode()).hexdigest())
    if prompt.strip().isdecimal():
        raise UsageError(
            f"--prompt {prompt} is a number, not a text",
            f"Give the length of the prompt with --prompt-length {prompt.strip()}; a text of digits, in a file.",
        )
    return PromptRecord(text=prompt, sha256=hashlib.sha256(prompt.encode()).hexdigest())


def _write(writer: TraceWriter, sequence: int, arrays: Mapping[str, Array], prompt: int) -> None:
    _, layers, _, length, _ = arrays["attention"].shape
    for layer in range(layers):
        for first in range(0, length, BLOCK):
            stop = min(first + BLOCK, length)
            rows = arrays["attention"][0, layer, :, first:stop, :stop].astype(np.float32)
            writer.attention(layer, sequence, first, rows)
        signals = {name: arrays[name][0, layer] for name in (*PER_KEY, "similarity") if name in arrays}
        if signals:
            writer.keys(layer, sequence, 0, **signals)
        if "queries" in arrays:
            writer.queries(layer, sequence, 0, arrays["queries"][0, layer].astype(np.float32).mean(0))
        vectors = {name: arrays[name][0, layer] for name in VECTORS if name in arrays}
        if vectors:
            writer.vectors(layer, sequence, 0, **vectors)
    given = arrays["tokens"][0] if "tokens" in arrays else np.full(length, -1)
    is_id = np.issubdtype(given.dtype, np.integer)
    writer.tokens(
        sequence,
        token_id=given if is_id else np.full(length, -1),
        text=[f"[{position}]" if is_id else str(token) for position, token in enumerate(given)],
        is_prompt=np.arange(length) < prompt,
        logprob=np.full(length, np.nan),
        entropy=np.full(length, np.nan),
    )
