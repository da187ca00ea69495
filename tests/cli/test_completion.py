"""A shell completes names, and no heavy library is loaded for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvscope.cli.completion import either_names, metric_names, policy_names, replay_names, trace_names
from kvscope.metrics import METRICS
from kvscope.policies import POLICIES
from tests.cli.conftest import Run
from tests.forks import Forks

HEAVY = ("torch", "numpy", "transformers", "pyarrow", "numba")
LISTED = f"""
import sys
from kvscope.cli.app import main
try:
    main()
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
Completed = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def completed() -> Iterator[Completed]:
    """A function that returns what bash offers for the last word of a line, which is empty after a space."""

    def offered(words: str) -> list[str]:
        count = len(words.split()) - (0 if words.endswith(" ") else 1)
        asked = {"_KVSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        made = forks.run(LISTED, environment=asked)
        assert made.stderr.strip() == "", "a heavy library was loaded, or an error printed"
        return made.stdout.split()

    with Forks("typer") as forks:
        yield offered


def test_names_are_those_of_the_registries() -> None:
    assert policy_names("") == sorted({*POLICIES.names(), "all"})
    assert metric_names("") == sorted(METRICS.names())
    assert policy_names("h2") == ["h2o"] and metric_names("output") == ["output_error"] and policy_names("zzz") == []


def test_traces_and_replays_are_those_that_are_complete(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "h2o", "--budget", "6", "-o", "first", "-q").status == 0
    Path("traces/unfinished").mkdir()
    Path("traces/unfinished/tokens.parquet").touch()
    assert (trace_names(""), replay_names("")) == (["small"], ["first"])
    assert either_names("") == ["first", "small"] and either_names("sm") == ["small"] and trace_names("x") == []


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("kvscope repl", ["replay"]),
        ("kvscope replay --policy h2", ["h2o"]),
        ("kvscope replay -p tov", ["tova"]),
        ("kvscope replay sm", ["small"]),
        ("kvscope replay --polcy h2o sm", ["small"]),
        ("kvscope verify ", ["small"]),
        ("kvscope info ", ["small"]),
        ("kvscope tune sm", ["small"]),
        ("kvscope replay --sort output", ["output_error"]),
        ("kvscope score --metric ideal_mass_no", ["ideal_mass_no_sinks"]),
        ("kvscope policies tov", ["tova"]),
        ("kvscope trace --do-", ["--do-sample"]),
        ("kvscope gate tr", ["train"]),
    ],
)
def test_what_a_shell_offers(words: str, offered: list[str], completed: Completed, small: Path) -> None:
    assert completed(words) == offered


def test_the_script_of_a_shell_is_printed(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvscope", "--show-completion", "bash"],
        # The shell is named: what started the tests, where Typer would look for one, need not be a shell.
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
            "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
        },
        capture_output=True,
        text=True,
    )
    assert "--install-completion" in run("--help").out
    assert done.returncode == 0, done.stderr
    assert "COMP_WORDS" in done.stdout or "COMP" in done.stdout
