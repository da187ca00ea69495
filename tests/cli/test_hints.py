"""Every command that a message suggests is run as it is printed, and must succeed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from kvscope.cli.hints import replay_of
from kvscope.core.options import Prefill
from tests.cli.conftest import PROMPT, Result, Run, maps

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures."
)


def suggested(text: str, before: str = "next: ") -> str:
    """Return the command that stands after `before` in a message."""
    found = re.search(rf"^{before}(kvscope .+)$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


def follow(run: Run, command: str) -> Result:
    """Run a suggested command, as a shell would."""
    done = run(*shlex.split(command)[1:])
    assert done.status == 0, f"{command}: {done.err}"
    return done


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ((), "kvscope replay --policy h2o --policy tova"),
        (("--store", "qkv"), "kvscope replay --policy h2o --policy tova"),
        (("--store", "topk:16"), "kvscope replay --policy h2o --policy tova"),
        (("--heads", "2-3"), "kvscope replay --policy h2o --policy window"),
        (("--max-new-tokens", "0"), "kvscope replay --policy h2o --policy tova --prefill stream"),
        (("-o", "elsewhere/a trace"), "kvscope replay 'elsewhere/a trace' --policy h2o --policy tova"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_trace_suggests_a_replay_that_runs(run: Run, options: tuple[str, ...], command: str) -> None:
    Path("prompt.txt").write_text(TEXT)
    done = run("trace", "--model", "demo", "prompt.txt", "--max-new-tokens", "8", *options)
    assert done.status == 0, done.err
    assert suggested(done.err) == command
    follow(run, command)


def test_a_trace_with_missing_rows_suggests_no_replay(run: Run) -> None:
    Path("prompt.txt").write_text(TEXT)
    recorded = ("trace", "--model", "demo", "prompt.txt", "--max-new-tokens", "8")
    done = run(*recorded, "--query-stride", "4")
    assert done.status == 0, done.err
    assert "next:" not in done.err
    assert "record it again without --query-stride" in done.err
    follow(run, suggested(run(*recorded).err))


@pytest.mark.parametrize(
    ("options", "more"),
    [(("--prompt-length", str(PROMPT)), ""), ((), " --prefill stream")],
    ids=["prompt", "no prompt"],
)
def test_import_suggests_a_replay_that_runs(run: Run, npz: Path, options: tuple[str, ...], more: str) -> None:
    done = run("import", npz, *options)
    assert done.status == 0, done.err
    assert suggested(done.err) == f"kvscope replay --policy h2o --policy tova{more}"
    follow(run, suggested(done.err))


def test_sequences_without_a_continuation_make_the_whole_replay_stream(run: Run) -> None:
    lengths = np.array([PROMPT, 24])  # the second sequence is all prompt
    np.savez("two.npz", attention=np.stack([maps(seed=0), maps(seed=1)]), prompt_length=lengths)
    follow(run, suggested(run("import", "two.npz").err))


def test_where_a_replay_is_missing_the_error_suggests_one_that_runs(run: Run, small: Path) -> None:
    for command in (["report"], ["report", "none"], ["diff", "one", "two"]):
        done = run(*command)
        assert done.status == 1
        what, todo = done.two_lines()
        assert suggested(todo, ".*Make one: ") == "kvscope replay --policy h2o --policy tova", what
    follow(run, suggested(todo, ".*Make one: "))
    assert run("report").status == 0


def test_a_replay_suggests_a_report_that_is_written(run: Run, small: Path) -> None:
    done = run("replay", "--policy", "h2o")
    assert done.status == 0, done.err
    page = follow(run, suggested(done.err)).out.strip()
    assert Path(page).is_file()


def test_a_replay_outside_reports_is_named(run: Run, small: Path) -> None:
    done = run("replay", "--policy", "h2o", "-o", "./a replay")
    assert suggested(done.err) == "kvscope report 'a replay'"
    follow(run, suggested(done.err))


def test_after_tuning_and_distilling_the_trace_and_the_prefill_are_named() -> None:
    assert replay_of("a2sf:@tuned.toml", ["many"], Prefill.stream) == (
        "kvscope replay many --policy a2sf:@tuned.toml --prefill stream"
    )
    assert replay_of("a2sf:@t.toml", ["one", "two"]) == "kvscope replay --policy a2sf:@t.toml"
    assert replay_of("a2sf:@my tuned.toml", []) == "kvscope replay --policy 'a2sf:@my tuned.toml'"


def test_where_a_trace_is_missing_no_file_is_named_that_may_not_exist(run: Run) -> None:
    for command in (["info"], ["info", "none"], ["replay", "--policy", "h2o"]):
        _, todo = run(*command).two_lines()
        assert "kvscope demo" in todo and "prompt.txt" not in todo
