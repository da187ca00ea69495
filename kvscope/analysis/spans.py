"""Spans of tokens: how much of a question, a fact or an instruction is held, and when half of it was evicted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from kvscope.core.errors import UsageError
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.text_spans import token_range
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

_RANGE = re.compile(r"(?P<start>\d+):(?P<stop>\d+)")


@dataclass(frozen=True)
class Span:
    """A named range of tokens of a sequence: `start` to `stop` - 1, counted from 0."""

    name: str
    start: int
    stop: int


class SpanAtStep(TypedDict):
    """How much of a span is held after a step; None before the span is complete."""

    step: int
    held: float | None
    whole: float | None


class SpanInLayer(TypedDict):
    """A span in one layer, or in all; `half_gone` is the first step after which at most half of it is held."""

    layer: int | Literal["all"]
    at: list[SpanAtStep]
    half_gone: int | None


class SpanResidency(TypedDict):
    """A span in all layers together and in each."""

    name: str
    start: int
    stop: int
    layers: list[SpanInLayer]
    tokens: int


class RunSpans(TypedDict):
    """The share of every span that one run holds, or, for a sparse reader, reads."""

    run: int
    policy: str
    label: str
    budget: str | None
    prefill: str
    loop: str
    reads: bool
    spans: list[SpanResidency]


class SpanReport(TypedDict):
    """The share of every span that the runs of a replay hold, as ``kvscope spans --json`` prints it."""

    kind: str
    schema: int
    replay: str
    trace: str
    sequence: int
    runs: list[RunSpans]


def parse_spans(given: Sequence[str], length: int, texts: Callable[[], Sequence[str]]) -> list[Span]:
    """Return the spans that a command line names, in order.

    ``NAME=120:140`` is a range of positions, the last excluded. ``NAME=text:WORDS`` are the tokens that contain
    the words, which may begin and end within a token; each occurrence is a separate span: ``NAME``, ``NAME-2``,
    ``NAME-3``, ...

    Parameters
    ----------
    given : sequence of str
        As typed.
    length : int
        ``T`` of the sequence.
    texts : callable
        Returns the text of every token; called only where it is needed.

    Raises
    ------
    UsageError
        For another syntax, positions beyond the sequence, words that do not occur, or a repeated name.
    """
    spans: list[Span] = []
    for item in given:
        name, equals, what = item.partition("=")
        name = name.strip()
        if not name or not equals:
            raise UsageError(f"span {item!r} has no name", "Write NAME=120:140 or NAME=text:WORDS.")
        if what.startswith("text:"):
            found = _places(what.removeprefix("text:"), texts())
            spans += [Span(f"{name}-{nth}" if nth > 1 else name, *place) for nth, place in enumerate(found, 1)]
        else:
            spans.append(Span(name, *_range(item, what, length)))
    names = [span.name for span in spans]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"span {name!r} is given twice", "Give each span a different name.")
    return spans


def spans_of_prompt(trace: Trace, sequence: int) -> list[Span]:
    """Return the spans that were recorded with a prompt; of those with one name, the second is ``NAME-2``, and so on.

    Raises
    ------
    UsageError
        If there are none.
    """
    seen: Counter[str] = Counter()
    spans = []
    for span in trace.record.sequences[sequence].spans:
        seen[span.name] += 1
        nth = seen[span.name]
        spans.append(Span(f"{span.name}-{nth}" if nth > 1 else span.name, span.start, span.stop))
    if not spans:
        raise UsageError("no span is given", "Name one or more: --span question=120:140 --span fact=text:WORDS")
    return spans


def spans_of(
    replay: Replay, spans: Sequence[Span], steps: Sequence[int], runs: Sequence[int] | None = None, sequence: int = 0
) -> SpanReport:
    """Return how much of each span each run holds; for a sparse reader, how much it reads.

    For each step, each layer and all layers together, ``held`` is the share of the span's tokens that a key/value head
    holds, averaged over heads, and ``whole`` is the share of heads that hold all of its tokens. Both are None at steps
    before the last token of the span. ``half_gone`` is the first step after it at which ``held`` is at most one half;
    None if there is none.

    Parameters
    ----------
    replay : Replay
        Residency intervals of the runs.
    spans : sequence of Span
        Spans of one sequence.
    steps : sequence of int
        Steps after which to report.
    runs : sequence of int, optional
        Numbers of the runs; all by default.
    sequence : int
        Number of the sequence.

    Raises
    ------
    UsageError
        If there is no such sequence or step.
    """
    trace = replay.info.trace
    _require_steps(replay, sequence, steps)
    chosen = [run for run in replay.info.runs if runs is None or run.run in runs]
    counts: dict[tuple[int, str], list[NDArray[np.int64]]] = {}  # (run, span) -> [G, T] of each layer
    for layer in trace.layers:
        for run, intervals in read_residency(replay, sequence, layer, [run.run for run in chosen]).items():
            for span in spans:
                counts.setdefault((run, span.name), []).append(held_tokens(intervals, span))
    return {
        "kind": "kvscope-spans",
        "schema": 1,
        "replay": str(replay.path),
        "trace": trace.name,
        "sequence": sequence,
        "runs": [
            {
                "run": run.run,
                "policy": run.policy,
                "label": run.label,
                "budget": run.budget,
                "prefill": run.prefill,
                "loop": run.loop,
                "reads": run.reads,
                "spans": [_described(span, counts[run.run, span.name], trace.layers, steps) for span in spans],
            }
            for run in chosen
        ],
    }


def _require_steps(replay: Replay, sequence: int, steps: Sequence[int]) -> None:
    """Raise UsageError unless the replay has the sequence, and the sequence the steps."""
    lengths = [each.length for each in replay.info.trace.sequences]
    if sequence not in range(len(lengths)):
        raise UsageError(f"{replay.path} has no sequence {sequence}", f"Name one from 0 to {len(lengths) - 1}.")
    length = lengths[sequence]
    for step in steps:
        if not 0 <= step < length:
            raise UsageError(f"sequence {sequence} has no step {step}", f"Name a step from 0 to {length - 1}.")


def held_tokens(intervals: ResidencyIntervals, span: Span) -> NDArray[np.int64]:
    """Return how many tokens of a span each head holds after each step, ``[G, T]``."""
    return intervals.held_tokens(span.start, span.stop)


def _described(
    span: Span, counts: Sequence[NDArray[np.int64]], layers: Iterable[int], steps: Sequence[int]
) -> SpanResidency:
    size, every = span.stop - span.start, np.stack(counts)  # [L, G, T]
    parts: list[tuple[int | Literal["all"], NDArray[np.int64]]] = [("all", every)]
    parts += [(layer, part[None]) for layer, part in zip(layers, every, strict=True)]
    return {
        "name": span.name,
        "start": span.start,
        "stop": span.stop,
        "layers": [
            {"layer": layer, "at": [_at(part, step, span) for step in steps], "half_gone": _half_gone(part, span)}
            for layer, part in parts
        ],
        "tokens": size,
    }


def _at(counts: NDArray[np.int64], step: int, span: Span) -> SpanAtStep:
    if step < span.stop - 1:
        return {"step": step, "held": None, "whole": None}
    size, now = span.stop - span.start, counts[..., step]
    return {"step": step, "held": float(now.mean()) / size, "whole": float((now == size).mean())}


def _half_gone(counts: NDArray[np.int64], span: Span) -> int | None:
    first, size = span.stop - 1, span.stop - span.start
    half = np.flatnonzero(2 * counts[..., first:].mean((0, 1)) <= size)
    return int(half[0]) + first if len(half) else None


def _range(item: str, what: str, length: int) -> tuple[int, int]:
    found = _RANGE.fullmatch(what.strip())
    if found is None:
        raise UsageError(f"span {item!r} is neither a range nor a text", "Write NAME=120:140 or NAME=text:WORDS.")
    start, stop = int(found["start"]), int(found["stop"])
    if not start < stop <= length:
        raise UsageError(
            f"span {item!r} is not a range within {length} tokens", "Write NAME=START:STOP, with STOP excluded."
        )
    return start, stop


def _places(words: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the tokens of every occurrence of the words, the earliest first; occurrences do not overlap."""
    if not words:
        raise UsageError("a span has no text", "Write NAME=text:WORDS.")
    whole = "".join(texts)
    found = [token_range(match.start(), match.end(), texts) for match in re.finditer(re.escape(words), whole)]
    if not found:
        raise UsageError(
            f"{words!r} is not in the sequence",
            "Write it exactly as in the text, with spaces and line ends, or give positions: NAME=120:140.",
        )
    return found
