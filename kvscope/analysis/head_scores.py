"""Scores of heads from traces with needles: how much of the attention of the answer's rows falls on the needle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvscope.analysis.spans import Span, parse_spans
from kvscope.core.errors import TraceError, UsageError
from kvscope.trace.reader import Trace

NEEDLE = "needle"  # name of the span that a question asks for, in prompts of `kvscope tasks make needle`


def head_scores(
    traces: Sequence[Trace], spans: Sequence[str] = (), progress: Callable[[float], None] | None = None
) -> NDArray[np.float64]:
    """Return the score of every query head of a model, ``[L, H]``, from 0 to 1.

    The score is the attention mass on the tokens of the needle in one row, the mean over the rows from which the model
    makes its answer: the last of the prompt and those of the text that follows, but for its last. Each sequence counts
    the same. This definition is ours. The scores of HeadKV (arXiv:2410.19258) count how often a token of the needle is
    among those with the largest weights; those of DuoAttention (arXiv:2410.10819) are learned.

    Parameters
    ----------
    traces : sequence of Trace
        Of one model, with all of its layers and heads.
    spans : sequence of str
        The needle: ``NAME`` of a span that was recorded with the prompts, ``NAME=text:WORDS`` for each occurrence of
        some words, or ``NAME=120:140``. By default the recorded spans ``needle``.
    progress : callable, optional
        Called with the completed share, from 0 to 1.

    Raises
    ------
    UsageError
        If a sequence has none of the spans, or nothing follows its prompt.
    TraceError
        If the traces are of different models, or lack layers, heads or rows.
    """
    for trace in traces:
        _require(trace, traces[0])
    found = []
    parts = [(trace, sequence.index) for trace in traces for sequence in trace.sequences]
    for number, (trace, sequence) in enumerate(parts, 1):
        found.append(_scores(trace, sequence, _needle(trace, sequence, spans)))
        if progress is not None:
            progress(number / len(parts))
    mean: NDArray[np.float64] = np.mean(found, axis=0)
    return mean


def as_table(scores: NDArray[np.float64]) -> str:
    """Return scores ``[L, H]`` as a line for each layer, columns separated by tabs."""
    return "".join("\t".join(f"{score:.6g}" for score in row) + "\n" for row in scores)


def as_json(scores: NDArray[np.float64]) -> str:
    """Return scores ``[L, H]`` as a JSON object with a list of one number for each head, ``{"12-3": [0.4]}``."""
    named = {f"{layer}-{head}": [round(float(score), 6)] for (layer, head), score in np.ndenumerate(scores)}
    return json.dumps(named, indent=1) + "\n"


def _scores(trace: Trace, sequence: int, spans: Sequence[Span]) -> NDArray[np.float64]:
    """Return the scores of one sequence, ``[L, H]``."""
    place = trace.sequences[sequence]
    tokens = sorted({token for span in spans for token in range(span.start, span.stop)})
    rows = [trace.attention(sequence, layer, place.prompt - 1, place.length - 1) for layer in trace.layers]
    return np.stack([layer[:, :, tokens].sum(-1, dtype=np.float64).mean(-1) for layer in rows])


def _needle(trace: Trace, sequence: int, given: Sequence[str]) -> list[Span]:
    """Return the spans of a sequence that are named, all within its prompt."""
    place, where = trace.sequences[sequence], f"sequence {sequence} of {trace.path}"
    if place.length <= place.prompt:
        raise UsageError(f"no tokens follow the prompt of {where}", "Record it with --max-new-tokens 8 or more.")
    names = [item for item in given if "=" not in item] or ([] if given else [NEEDLE])
    recorded = trace.record.sequences[sequence].spans
    spans = [Span(one.name, one.start, one.stop) for one in recorded if one.name in names]
    written = [item for item in given if "=" in item]
    spans += parse_spans(written, place.length, lambda: [str(text) for text in trace.tokens(sequence)["text"]])
    inside = [span for span in spans if span.stop <= place.prompt]
    if not inside:
        known = ", ".join(sorted({one.name for one in recorded})) or "none"
        raise UsageError(
            f"the prompt of {where} has no span {', '.join(names or written)}; recorded with it: {known}",
            "Name the needle: --span fact=text:WORDS, or record prompts of kvscope tasks make needle.",
        )
    return inside


def _model(trace: Trace) -> tuple[object, ...]:
    """Return what tells models apart: name, revision, sizes, and the sample of weights where a trace has it."""
    header = trace.header
    sizes = (header.n_layers, header.heads, header.kv_heads, header.head_dim)
    return header.model.id, header.model.revision, header.model.sha256, header.model.weights, *sizes


def _require(trace: Trace, other: Trace) -> None:
    """Raise TraceError unless a trace has all heads of its model, which is that of `other`."""
    header = trace.header
    if header.layer_heads or header.head_numbers or len(trace.layers) != header.n_layers:
        raise TraceError(
            f"{trace.path} does not hold the same heads of every layer of its model, so no table of heads can be made",
            "Record all layers and heads, of a model whose layers have equally many heads.",
        )
    if _model(trace) != _model(other):
        raise TraceError(f"{trace.path} and {other.path} are of different models", "Name traces of one model.")
