"""Traces and replays for the campaign: the examples in git, and others that are made from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvscope.core.answer_records import AnswerSpan, ExampleRef
from kvscope.core.residency import ResidencyIntervals
from kvscope.results.store import Replay, open_replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.schema import STORES, TOPK
from kvscope.trace.stretches import stretches
from kvscope.trace.writer import TraceWriter
from tools.mutations import Subject

LENGTH, PROMPT, TOP = 40, 28, 6  # of the small traces


def make_subjects(folder: Path, root: Path) -> dict[str, Subject]:
    """Return the folders to damage, made under `folder` unless they are there."""
    example, replay = folder / "example", folder / "replay"
    if not folder.exists():
        folder.mkdir(parents=True)
        shutil.copytree(root / "traces" / "example", folder / "committed")
        source = open_trace(root / "traces" / "example")
        for name, store in (("example", "maps+vectors"), ("qkv", "qkv"), ("topk", TOPK)):
            for other in (False, True):
                write(folder / f"{name}{'-other' * other}", source, store, other)
        for other in (False, True):
            write_replay(folder / f"replay{'-other' * other}", open_replay(root / "reports" / "example"), other)
    found = {
        name: Subject(folder / name, "trace.json", folder / f"{name}-other") for name in ("example", "qkv", "topk")
    }
    found["committed"] = Subject(folder / "committed", "trace.json", example)
    found["replay"] = Subject(replay, "run.json", folder / "replay-other")
    return found


def write(path: Path, source: Trace, store: str, other: bool) -> None:
    """Write the first tokens of a trace in some store; the other one has its heads in reverse order."""
    stored = [*STORES[store], *(["hidden"] if store == "maps+vectors" else [])]
    scaling = source.header.model.attention.scaling if source.header.model.attention else None
    attention = [LayerAttention(scaling or 1.0) for _ in source.layers] if store == "qkv" else []
    header = replace(source.header, stored=stored, attention=attention, top=TOP if store == TOPK else None)
    if other:
        header = replace(header, prompts=[replace(prompt, sha256="0" * 64) for prompt in header.prompts])
    order = slice(None, None, -1 if other else 1)
    with TraceWriter(path, header) as writer:
        for layer in source.layers:
            rows = source.attention(0, layer, 0, LENGTH)[order]
            sums = source.row_sums(0, layer)[order, :LENGTH]
            if "maps" in stored:
                writer.attention(layer, 0, 0, rows, row_sum=sums)
            if TOPK in stored:
                write_top(writer, layer, rows)
            if "key_l2" in stored:
                norms = {name: source.value_norms(0, layer, order_)[order, :LENGTH] for name, order_ in ORDERS}
                norms["key_l2"] = source.key_norms(0, layer)[order, :LENGTH]
                if "similarity" in stored:
                    norms["similarity"] = source.similarity(0, layer)[order, :LENGTH, :LENGTH]
                writer.keys(layer, 0, 0, **norms)
            if "queries" in stored:
                writer.queries(layer, 0, 0, source.mean_queries(0, layer)[:LENGTH] * (1 - other / 2))
            if "vectors:keys" in stored:
                states = source.states(0, layer)._asdict()
                writer.vectors(layer, 0, 0, **{name: array[order, :LENGTH] for name, array in states.items()})
            if "hidden" in stored:
                writer.hidden(layer, 0, 0, source.hidden(0, layer)[:LENGTH] * (1 - other / 2))
        tokens = source.tokens(0)[:LENGTH]
        columns = {name: tokens[name].to_numpy() for name in ("token_id", "logprob", "entropy")}
        writer.tokens(0, **columns, text=list(tokens["text"]), is_prompt=np.arange(LENGTH) < PROMPT)
        writer.finish([replace(source.record.sequences[0], prompt=PROMPT, length=LENGTH)])


ORDERS = (("value_l1", "l1"), ("value_l2", "l2"))


def write_top(writer: TraceWriter, layer: int, rows: np.ndarray) -> None:
    """Write the heaviest keys of rows ``[H, T, T]``, and the sums of their columns."""
    first = 0
    for stop in stretches(PROMPT, LENGTH):
        part = rows[:, first:stop, :stop]
        keys = np.sort(np.argsort(-part, axis=-1, kind="stable")[..., :TOP], axis=-1)
        for row, position in enumerate(range(first, min(stop, TOP - 1))):
            keys[:, row, : position + 1] = np.arange(position + 1)
        weights = np.take_along_axis(part, keys, -1)
        outside = part.copy()
        position = np.arange(first, stop)
        there = np.arange(TOP) < np.minimum(position + 1, TOP)[:, None]
        for head, row in np.ndindex(outside.shape[:2]):
            outside[head, row, keys[head, row][there[row]]] = 0
        residual = outside.sum(-1)
        sums = part.sum(-1)
        writer.topk(layer, 0, first, keys, weights, row_sum=sums, residual=residual, log_sum_exp=np.zeros_like(sums))
        writer.columns(layer, 0, stop - 1, part.sum(1), outside.sum(1))
        first = stop


def write_replay(path: Path, source: Replay, other: bool) -> None:
    """Write two runs of a replay in both loops; the other one has its open runs exchanged."""
    info = source.info
    open_runs = [run for run in info.runs if run.loop == "open" and run.budget is not None][:2]
    closed = [run for run in info.runs if run.open_run in [run.run for run in open_runs]]
    kept = [*open_runs, *closed]
    last = info.trace.sequences[0].length
    example = ExampleRef(
        0, ("7",), "any", (AnswerSpan(last - 2, last),), id="one", task="needle", length=last, depth=0.5
    )
    info = replace(info, trace=replace(info.trace, examples=(example,)))
    if other:
        info = replace(info, trace=replace(info.trace, identity="0" * 64))
    record = replace(info, runs=tuple(kept), complete=False, sizes={}, checksums={}, created="")
    with ReplayWriter(path, record) as writer:
        for number, run in enumerate(kept):
            taken = kept[1 - number if other and number < 2 else number].run
            copy_run(writer, source, run.run, taken)
        writer.finish()


def copy_run(writer: ReplayWriter, source: Replay, run: int, taken: int) -> None:
    """Write as a run what another run of a replay has."""
    trace = source.info.trace
    for layer in trace.layers:
        frame = source.residency(taken, 0, layer)
        columns = {name: frame[name].to_numpy(np.int32) for name in ("kv_head", "key", "enter")}
        leave = frame["leave"].fillna(-1).to_numpy(np.int32)
        length = trace.sequences[0].length
        intervals = ResidencyIntervals.of(**columns, leave=leave, heads=trace.kv_heads, length=length)
        writer.residency(run, 0, layer, intervals)
        rows = source.fidelity(taken, 0, layer).sort_values(["head", "step"])
        steps = rows["step"].unique()
        values = {name: rows[name].to_numpy().reshape(trace.heads, -1) for name in source.info.metrics}
        writer.fidelity(run, 0, layer, steps, values)
    losses = source.tokens(taken)
    if len(losses):
        names = [name for name in losses.columns if name not in ("run", "sequence", "position")]
        values = {name: losses[name].to_numpy() for name in names}
        writer.tokens(run, 0, losses["position"].to_numpy(np.int32), values)
        writer.answer(run, 0, f"it is {taken}", 3, 0.5)
