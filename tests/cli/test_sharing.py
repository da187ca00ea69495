"""Packed files and addresses on the command line: every command that reads a trace or a replay takes an address."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from kvscope.cli.app import program
from kvscope.cli.options import command_line
from tests.cli.conftest import Run

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def far(run: Run, small: Path, tmp_path: Path) -> str:
    """An address with a trace ``small`` and a replay ``runs``, neither of which is in this folder any more."""
    done = run("replay", "small", "-p", "h2o", "-p", "tova", "-b", "50%", "-o", "runs", "-q")
    assert done.status == 0, done.err
    (tmp_path / "far").mkdir()
    for folder in ("traces/small", "reports/runs"):
        shutil.move(folder, tmp_path / "far")
    return f"file://{tmp_path / 'far'}"


def test_pack_and_unpack(run: Run, small: Path) -> None:
    whole = {file.name: file.read_bytes() for file in small.rglob("*.parquet")}
    done = run("pack", "small", "--json")
    made = json.loads(done.out)
    assert done.status == 0 and (made["file"], made["content"]) == ("small.kvscope.tar", "trace")
    assert "kvscope unpack small.kvscope.tar" in done.err
    assert run("unpack", "small.kvscope.tar").two_lines()[0] == "traces/small exists already"
    done = run("unpack", "small.kvscope.tar", "-o", "again", "--json")
    assert json.loads(done.out)["path"] == "traces/again" and json.loads(done.out)["sha256"] == made["sha256"]
    assert {file.name: file.read_bytes() for file in Path("traces/again").rglob("*.parquet")} == whole
    assert run("info", "again", "--verify").status == 0
    assert run("pack", "traces/again", "-o", "b.tar", "-q").status == 0
    assert Path("b.tar").read_bytes() == Path("small.kvscope.tar").read_bytes()
    assert run("pack", "small").two_lines()[0] == "small.kvscope.tar exists already"
    assert run("pack", "small", "--force").status == 0
    done = run("unpack", "small.kvscope.tar", "--force")
    assert (done.status, "traces/small" in done.out) == (0, True)
    assert "kvscope replay traces/small" in done.err


def test_pack_a_replay(run: Run, small: Path) -> None:
    assert run("replay", "small", "-p", "tova", "-b", "50%", "-o", "runs", "-q").status == 0
    assert run("pack", "runs", "-o", "x").status == 0
    done = run("unpack", "x", "-o", "other")
    assert done.status == 0 and "reports/other" in done.out
    assert run("diff", "runs", "other").status == 0
    assert run("report", "other", "-o", "page", "-q").status == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("unpack", "none.tar"), "none.tar does not exist"),
        (("unpack", "traces"), "traces is not a file"),
        (("unpack", "notes.tar"), "notes.tar is not a packed file"),
        (("info", "notes.tar"), "notes.tar is a packed file"),
        (("replay", "notes.tar", "-p", "h2o"), "notes.tar is a packed file"),
        (("pack", "nothing"), "no trace nothing"),
        (("info", "s3://"), "s3:// is not an address"),
        (("info", "nosuch://x"), "nosuch://x/trace.json has an unknown protocol, nosuch"),
        (("report", "https://"), "https:// is not an address"),
        (("unpack", "file:///nowhere/x.tar"), "there is no file:///nowhere/x.tar"),
        (("diff", "file:///nowhere/x.json", "file:///nowhere/y", "--update"), "so it cannot be written"),
    ],
)
def test_errors_have_two_lines(run: Run, small: Path, arguments: tuple[str, ...], what: str) -> None:
    Path("notes.tar").write_text("notes")
    done = run(*arguments)
    assert done.status in (1, 2) and what in done.two_lines()[0]


def test_a_damaged_file_leaves_nothing(run: Run, small: Path) -> None:
    run("pack", "small", "-q")
    content = bytearray(Path("small.kvscope.tar").read_bytes())
    content[len(content) // 2] ^= 1
    Path("small.kvscope.tar").write_bytes(bytes(content))
    done = run("unpack", "small.kvscope.tar", "-o", "new")
    assert done.status == 1 and "small.kvscope.tar is damaged: " in done.two_lines()[0]
    assert sorted(path.name for path in Path("traces").iterdir()) == ["small"]


@pytest.mark.parametrize(
    "command",
    [
        ("info", "{trace}", "--verify"),
        ("replay", "{trace}", "-p", "tova", "-b", "40%", "-o", "x"),
        ("tune", "{trace}", "-p", "a2sf", "--prefill", "stream", "--grid", "alpha=0.1,0.9", "-o", "x.toml"),
        ("gate", "train", "--distill", "{trace}"),
        ("info", "{replay}", "--verify"),
        ("score", "{replay}", "--trace", "{trace}", "-o", "x"),
        ("report", "{replay}", "-o", "x"),
        ("diff", "{replay}", "{replay}", "--decisions"),
        ("diff", "{replay}/summary.json", "{replay}"),
        ("export", "{replay}", "-o", "x"),
        ("regret", "{replay}", "--trace", "{trace}"),
        ("spans", "{replay}", "--trace", "{trace}", "--span", "x=2:5"),
        ("compare", "{replay}", "-p", "h2o", "-p", "tova"),
        ("pack", "{trace}", "-o", "x.tar"),
        ("unpack", "{packed}", "-o", "x"),
    ],
    ids=lambda command: " ".join(command[:2]).replace("{", "").replace("}", ""),
)
def test_every_command_reads_an_address(run: Run, far: str, command: tuple[str, ...], cache: Path) -> None:
    run("pack", far.removeprefix("file://") + "/small", "-o", far.removeprefix("file://") + "/p.tar", "-q")
    places = {"trace": f"{far}/small", "replay": f"{far}/runs", "packed": f"{far}/p.tar"}
    done = run(*(word.format(**places) for word in command))
    lacks = {"gate": "has no layer inputs", "tune": "1 of 1 sequences"}.get(command[0])
    if lacks is not None:  # this trace does not have what the command needs, and that is seen in the fetched one
        assert done.status in (1, 2) and lacks in done.two_lines()[0] and "fetched from" in done.err, done.err
        return
    assert done.status == 0, done.err
    assert command[0] == "unpack" or "fetched from file://" in done.err
    again = run(*(word.format(**places) for word in command), *(["--force"] if "x" in command else []))
    assert "fetched from" not in again.err, "what is kept is not fetched again"


def test_results_do_not_depend_on_where_a_trace_is(run: Run, far: str, tmp_path: Path) -> None:
    run("pack", tmp_path / "far" / "small", "-o", tmp_path / "far" / "p.tar", "-q")
    for name, place in (("a", str(tmp_path / "far" / "small")), ("b", f"{far}/small"), ("c", f"{far}/p.tar")):
        assert run("replay", place, "-p", "h2o", "-p", "tova", "-b", "30%", "-o", name, "-q").status == 0
    for other in ("b", "c"):
        first, second = (json.loads(Path("reports", name, "summary.json").read_text()) for name in ("a", other))
        assert first["runs"] == second["runs"] and first["trace"]["identity"] == second["trace"]["identity"]
        assert run("diff", "a", other, "--decisions").status == 0


def test_secrets_of_addresses_are_not_stored() -> None:
    typed = ["replay", "https://me:pw@host/story?X-Amz-Signature=secret", "-p", "h2o"]
    context = typer.Context(typer.main.get_command(program()), obj=typed)
    assert command_line(context) == "kvscope replay https://host/story -p h2o"


def test_verify_reads_an_address(run: Run) -> None:
    done = run("verify", f"file://{ROOT}/traces/example", "-p", "tova", "--tokens", "4", "--sequences", "1")
    assert done.status == 0, done.err
