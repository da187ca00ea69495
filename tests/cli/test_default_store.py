"""Without --store, a small trace has vectors, so that output_error can be computed; a large one names what it lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvscope.model import compile as compile_module
from kvscope.trace.reader import open_trace
from tests.cli.conftest import Run
from tests.models.build import saved

TRACE = ("trace", "--model", "demo", "p.txt", "--max-new-tokens", "6", "--output")


@pytest.fixture(autouse=True)
def prompt(run: Run) -> None:
    Path("p.txt").write_text("Note: Clara holds 583.\n\nQuestion: what holds Clara? Answer: Clara holds")


def test_a_small_trace_has_vectors_and_says_so(run: Run) -> None:
    done = run(*TRACE, "a")
    assert done.status == 0, done.err
    assert "store: maps+vectors, because the trace is small" in done.err
    announced = float(re.findall(r"writes about ([\d.]+) kB", done.err)[0])
    assert announced * 1e3 <= compile_module.SMALL
    assert sum(file.stat().st_size for file in Path("traces/a").rglob("*.parquet")) < 2 * announced * 1e3
    assert open_trace(Path("traces/a")).header.store == "maps+vectors"
    replayed = run("replay", "a", "--policy", "h2o", "--policy", "keydiff", "--budget", "8", "--json", "-q")
    assert {"output_error"} <= set(json.loads(replayed.out)["runs"][0]["metrics"]), replayed.err


def test_a_large_trace_has_rows_alone_and_names_the_other_stores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TRACE, "named", "--store", "maps", "-q").status == 0
    small = run(*TRACE, "small")
    announced = float(re.findall(r"writes about ([\d.]+) kB", small.err)[0])
    monkeypatch.setattr(compile_module, "SMALL", int(0.9 * announced * 1e3))
    done = run(*TRACE, "a")
    assert done.status == 0, done.err
    assert re.search(
        r"store: maps, because the trace is large; .*--store maps\+vectors \(\d.* kB\) or qkv \(", done.err
    )
    made, named = (open_trace(Path("traces") / name, verify=True) for name in ("a", "named"))
    assert made.header.stored == named.header.stored and made.header.rotary == named.header.rotary == []
    assert {file.name for file in made.path.rglob("*")} == {file.name for file in named.path.rglob("*")}
    kept = run(*TRACE, "b", "--store", "maps+vectors")
    assert open_trace(Path("traces/b")).header.store == "maps+vectors" and "since" not in kept.err


def test_where_only_rows_can_be_recorded_these_are(run: Run, tmp_path: Path) -> None:
    saved(tmp_path / "model", "bloom")
    Path("words.txt").write_text(" ".join(f"w{(7 * number) % 101 + 3}" for number in range(14)))
    done = run("trace", "--model", tmp_path / "model", "words.txt", "--max-new-tokens", "3", "-o", "rows")
    assert done.status == 0, done.err
    assert "store: maps, the only one that this model supports" in done.err
    strided = run(*TRACE, "strided", "--query-stride", "2")
    assert strided.status == 0, strided.err
    assert open_trace(Path("traces/strided")).header.store == "maps" and "store: " not in strided.err
