"""Scores of heads are the attention mass on a needle in the rows of the answer, and policies read the file of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvscope
from kvscope.analysis.head_scores import as_json, as_table, head_scores
from kvscope.analysis.spans import parse_spans
from kvscope.core.errors import TraceError, UsageError
from kvscope.policies.head_scores import head_scores as read_scores
from kvscope.trace.reader import Trace, open_trace
from tests.trace import make

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(EXAMPLE)


def needle(trace: Trace) -> tuple[str, list[int]]:
    """Return how the command line names the first number of the prompt, and its tokens."""
    texts = [str(text) for text in trace.tokens(0)["text"]]
    prompt = trace.sequences[0].prompt
    number = "".join(texts[:prompt]).split("Note: ")[1].split(".")[0].split()[-1]
    spans = parse_spans([f"fact=text:{number}"], trace.sequences[0].length, lambda: texts)
    inside = sorted({token for span in spans for token in range(span.start, span.stop) if span.stop <= prompt})
    return f"fact=text:{number}", inside


def test_scores_are_the_mean_mass_on_the_needle(example: Trace) -> None:
    span, tokens = needle(example)
    found = head_scores([example], [span])
    place = example.sequences[0]
    assert found.shape == (len(example.layers), example.heads) and len(tokens) > 1
    for layer in example.layers:
        rows = example.attention(0, layer)
        for head in range(example.heads):
            masses = [
                sum(float(rows[head, query, key]) for key in tokens)
                for query in range(place.prompt - 1, place.length - 1)
            ]
            assert found[layer, head] == pytest.approx(sum(masses) / len(masses), abs=1e-6)


def test_every_sequence_counts_the_same(example: Trace) -> None:
    span, _ = needle(example)
    shares: list[float] = []
    once, twice = head_scores([example], [span]), head_scores([example, example], [span], shares.append)
    assert np.array_equal(once, twice) and shares == [0.5, 1.0]


@pytest.mark.parametrize("name", ["heads.tsv", "heads.json"])
def test_policies_read_what_is_written(example: Trace, tmp_path: Path, name: str) -> None:
    span, _ = needle(example)
    scores, file = head_scores([example], [span]), tmp_path / name
    file.write_text((as_json if name.endswith("json") else as_table)(scores))
    read = read_scores(str(file), len(example.layers), example.kv_heads).numpy()
    assert np.allclose(read, scores.reshape(len(scores), example.kv_heads, -1).mean(-1), rtol=1e-5, atol=1e-6)
    replay = kvscope.replay(example, [f"headkv:heads={file}", f"duo-attention:heads={file},recent=16,sinks=4"], 0.2)
    assert all(np.isfinite(run.mean("retained_mass")) for run in replay.summary.runs)


def test_what_is_refused(example: Trace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no span needle"):
        head_scores([example])
    late = f"end={example.sequences[0].prompt}:{example.sequences[0].prompt + 1}"
    with pytest.raises(UsageError, match="has no span end="):
        head_scores([example], [late])
    make.record(tmp_path / "t", lengths=[9], prompt=4)
    with pytest.raises(TraceError, match="does not hold the same heads of every layer"):
        head_scores([open_trace(tmp_path / "t")], ["fact=0:2"])
