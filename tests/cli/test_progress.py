"""The bars of commands that take long move with what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvscope.cli import console
from tests.cli.conftest import Run

Bars = dict[str, list[float]]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    """What every bar is told, as shares of its total, by its title."""
    told: Bars = {}

    @contextmanager
    def bar(title: str, total: float | None, unit: str, *, quiet: bool = False) -> Iterator[console.Update]:
        shares = told.setdefault(title, [])
        whole = total

        def update(done: float, detail: str = "", total: float | None = None) -> None:
            shares.append(done / (total or whole or 1))

        yield update

    monkeypatch.setattr(console, "bar", bar)
    return told


def test_bars_move_with_decoded_tokens_and_panels(run: Run, bars: Bars) -> None:
    line = '{"prompt": "Note: Clara holds 583.\\n\\nQuestion: what holds Clara? Answer: Clara holds", "answer": "583"}'
    Path("p.jsonl").write_text(line, encoding="utf-8")
    assert run("trace", "--model", "demo", "p.jsonl", "-o", "t", "--max-new-tokens", "6", "-q").status == 0
    assert run("verify", "t", "--policy", "window", "--budget", "50%", "--dtype", "float64", "-q").status == 0
    assert run("replay", "t", "--policy", "window", "--budget", "50%", "--generate", "-o", "r", "-q").status == 0
    assert run("report", "r", "-q").status == 0
    for title, least in (("decoding", 3 * 5), ("replaying", 5), ("drawing", 10)):
        shares = bars[title]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(1), title
        assert len({share for share in shares if share < 1}) >= least, title


def test_bars_move_while_weights_are_loaded(run: Run, bars: Bars) -> None:
    Path("p.txt").write_text("Note: Clara holds 583. What holds Clara?", encoding="utf-8")
    model, dtype = ("--model", "demo"), ("--dtype", "float64")
    limited = ("--policy", "window", "--budget", "50%", *dtype)
    assert run("trace", *model, "p.txt", "-o", "t", "--max-new-tokens", "2", "-q").status == 0
    assert run("verify", "t", *limited, "-q").status == 0
    assert run("replay", "t", *limited, "--perplexity", "-o", "r", "-q").status == 0
    for title in ("loading demo", "loading the model", "checking the replay"):
        shares = bars[title]
        assert len(set(shares)) > 20, title
        first = shares[: shares.index(1) + 1]
        assert first == sorted(first) and first[0] == 0, title
