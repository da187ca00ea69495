"""Import attention maps that were captured elsewhere as a trace; every row is checked first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from kvscope.core.errors import TraceError, UsageError
from kvscope.core.output import checksum
from kvscope.core.text_files import read_text, require_whole
from kvscope.core.version import versions
from kvscope.trace.blocks import Array
from kvscope.trace.derive import cosines, norms
from kvscope.trace.import_axes import PER_KEY, PER_QUERY, arrange
from kvscope.trace.import_files import read_captured
from kvscope.trace.import_sinks import leave_share, sink_rows
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.row_checks import faults_of_sums
from kvscope.trace.schema import VECTORS
from kvscope.trace.space import estimate_bytes, require_space
from kvscope.trace.writer import TraceWriter

ABOVE_TOLERANCE = 1e-6  # largest weight above the diagonal that counts as zero
OF_KEYS = (*PER_KEY, "keys", "values")  # arrays that have the number of key/value heads
LARGEST = float(np.finfo(np.float32).max) / 2**16  # so that norms are finite too
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
    """Return a trace of the arrays in a file.

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
        Axes of attention, as ``LBHTT``: see `kvscope.trace.import_axes.arrange`.
    kv_heads : int, optional
        ``G``, where no array has it; by default every query head has its own keys and values.
    learned_sinks : bool
        Whether the model has learned sinks. Rows that sum to one are then those before a sink takes its share.
    force : bool
        Whether to replace an existing trace.

    Raises
    ------
    UsageError
        If the file cannot be read, or an array has the wrong shape.
    TraceError
        If a row is not causal, not finite, negative, or does not sum to one; the message says which.
    """
    source, text = Path(source), _prompt(prompt)
    captured = arrange(read_captured(source), axes, prompt_length)
    groups = _check(captured.sequences, kv_heads, learned_sinks)
    for arrays in captured.sequences:
        _derive(arrays)
        leave_share(arrays)
    records, first = [_lengths(arrays) for arrays in captured.sequences], captured.sequences[0]
    sinks = sink_rows(captured.sequences, learned_sinks)
    header = _header(source, first, groups, sinks, text, captured.assumed + _assumed(first, kv_heads, sinks))
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
    source: Path,
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
        model=ModelRecord(id=f"imported from {source.name}", sha256=checksum(source)),
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


def _check(sequences: Sequence[Mapping[str, Array]], kv_heads: int | None, learned_sinks: bool) -> int:
    """Return ``G``; raise UsageError or TraceError for an array of a sequence with a wrong shape, or a wrong row."""
    groups = 1
    for number, arrays in enumerate(sequences):
        groups = _check_shapes(arrays, kv_heads)
        place = f"sequence {number}, " if len(sequences) > 1 else ""
        _check_rows(arrays["attention"][0], learned_sinks and "sink_mass" not in arrays, place)
    return groups


def _check_shapes(arrays: Mapping[str, Array], kv_heads: int | None) -> int:
    """Return ``G``, where no array has it `kv_heads`, or ``H``; raise UsageError for an array with the wrong shape."""
    count, layers, heads, length, keys = arrays["attention"].shape
    if length != keys or 0 in arrays["attention"].shape:
        raise UsageError(
            f"attention has the shape {list(arrays['attention'].shape)}", "Make its last two axes both T, above 0."
        )
    groups = next((arrays[name].shape[2] for name in OF_KEYS if name in arrays), kv_heads or heads)
    if kv_heads not in (None, groups):
        raise UsageError(f"the arrays have {groups} key/value heads, not {kv_heads}", "Omit --kv-heads.")
    if groups == 0 or heads % groups:
        raise UsageError(f"{heads} query heads do not share {groups} key/value heads evenly", "Make H a multiple of G.")
    for name in (*PER_KEY, *PER_QUERY, *VECTORS):
        if name in arrays:
            expected = (count, layers, heads if name in ("queries", *PER_QUERY) else groups, length)
            if arrays[name].shape[:4] != expected or arrays[name].ndim != (5 if name in VECTORS else 4):
                raise UsageError(
                    f"{name} has the shape {list(arrays[name].shape)}",
                    f"Make it begin with {list(expected)} (S, L, heads, T).",
                )
            if not (np.abs(arrays[name].astype(np.float64)) <= LARGEST).all():  # NaN too
                raise UsageError(
                    f"{name} contains values that are not finite in 32 bit", "Save it without NaN, infinity and above."
                )
            if name in PER_KEY and (arrays[name] < 0).any():
                raise UsageError(f"{name} contains a negative norm", "Save norms, which are zero or more.")
            if name in PER_QUERY and ((arrays[name] < 0) | (arrays[name] > 1)).any():
                raise UsageError(
                    f"{name} contains a share outside 0 to 1", "Save the share that the sink takes of a row."
                )
    if "tokens" in arrays and arrays["tokens"].shape != (count, length):
        raise UsageError(f"tokens has the shape {list(arrays['tokens'].shape)}", f"Make it {[count, length]} (S, T).")
    return int(groups)


def _check_rows(attention: Array, learned_sinks: bool, place: str) -> None:
    """Raise TraceError for the first row of ``[L, H, T, T]`` that is not causal attention; `place` goes before it."""
    for layer, heads in enumerate(attention):
        for head, whole in enumerate(heads):
            for first in range(0, len(whole), BLOCK):
                fault = _fault_of_rows(whole[first : first + BLOCK], first, learned_sinks)
                if fault is not None:
                    raise TraceError(
                        f"{place}layer {layer}, head {head}, {fault}",
                        "Save attention after softmax, [query, key], causal; declare learned sinks.",
                    )


def _fault_of_rows(given: Array, first: int, learned_sinks: bool) -> str | None:
    """Return what is wrong with rows ``[q, T]`` from position `first` on, None if they are causal attention."""
    with np.errstate(over="ignore"):  # what is infinite in 32 bit is reported
        rows = given.astype(np.float32)
    above = np.arange(rows.shape[1]) > first + np.arange(len(rows))[:, None]  # [q, T]
    sums = rows.sum(-1)
    faults = {
        "has a weight that is not finite": ~np.isfinite(rows).all(-1),
        "has a negative weight": (rows < 0).any(-1),
        "attends to a later key": (np.where(above, np.abs(rows), 0) > ABOVE_TOLERANCE).any(-1),
        **faults_of_sums(sums, learned_sinks),
    }
    for what, where in faults.items():
        if where.any():
            row = int(where.argmax())
            return f"row {first + row} {what} (sum {sums[row]:.4f})"
    return None


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
