"""Scores of heads are the attention mass on a needle in the rows of the answer, and policies read the file of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvscope
from kvscope.analysis.head_scores import as_json, as_table, head_scores
from kvscope.analysis.spans import parse_spans
from kvscope.core.errors import TraceError, UsageError
from kvscope.policies.head_scores import head_scores as read_scores
from kvscope.trace.reader import TokenSequence, Trace, open_trace
from kvscope.trace.record import ModelRecord
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


ROWS = np.zeros((2, 5, 5), np.float32)
ROWS[0, 2:4, :4] = [[0.1, 0.6, 0.3, 0], [0.2, 0.4, 0.2, 0.2]]
ROWS[1, 2:4, :4] = [[1, 0, 0, 0], [0, 0.5, 0.5, 0]]
ROWS[:, 4, 1] = 1  # makes no token: nothing follows


def made(prompt: int = 3, **changes: object) -> Any:
    """Return a trace of one layer, two heads and five tokens, of which token 1 is the needle."""
    model = ModelRecord(id="made")
    facts = {"layer_heads": [], "head_numbers": None, "n_layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 4}
    return SimpleNamespace(
        path=Path("made"),
        layers=[0],
        sequences=[TokenSequence(0, prompt, 5)],
        header=SimpleNamespace(**{"model": model, **facts, **changes}),
        record=SimpleNamespace(sequences=[SimpleNamespace(spans=[SimpleNamespace(name="needle", start=1, stop=2)])]),
        attention=lambda sequence, layer, start, stop: ROWS[:, start:stop, :stop],
    )


def test_scores_worked_out_by_hand() -> None:
    """The prompt has three tokens: rows 2 and 3 make the two that follow."""
    assert head_scores([made()]) == pytest.approx(np.array([[0.5, 0.25]]))


@pytest.mark.parametrize(
    "changes", [{"model": ModelRecord(id="other")}, {"model": ModelRecord(id="made", revision="2")}, {"head_dim": 8}]
)
def test_models_are_not_mixed(changes: dict[str, object]) -> None:
    """Neither trace has a sample of weights: name and sizes tell the models apart."""
    with pytest.raises(TraceError, match="are of different models"):
        head_scores([made(), made(**changes)])


def test_a_prompt_that_nothing_follows_has_no_answer() -> None:
    with pytest.raises(UsageError, match="no tokens follow the prompt of sequence 0 of made"):
        head_scores([made(prompt=5)])


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "heads.tsv"
    for text, expected in (("1\t2\n", [[1, 2]]), ("3\t4.5\n", [[3, 4.5]])):
        file.write_text(text)
        assert read_scores(str(file), 1, 2).tolist() == expected
