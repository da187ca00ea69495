"""A user's mistakes: one line what is wrong, one line what to do, the right status, and nothing lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvscope.cli import app as app_module
from kvscope.cli.app import run as run_command
from kvscope.cli.misspelt import require_spelt
from kvscope.core.errors import UsageError
from tests.cli.conftest import Run


def edit_header(trace: Path, **changes: object) -> None:
    file = trace / "trace.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["replay", "--policy", "h20"], "h20", "h2o"),
        (["replay"], "no policy", "--policy"),
        (["replay", "--polcy", "h2o"], "unknown option --polcy", "Did you mean --policy?"),
        (["replay", "nosuch", "--polcy=h2o"], "unknown option --polcy", "Did you mean --policy?"),
        (["replay", "--policy", "h2o", "--jsn"], "unknown option --jsn", "Did you mean --json?"),
        (["replay", "--perplexty", "--policy", "h2o"], "unknown option --perplexty", "Did you mean --perplexity?"),
        (["replay", "--alhpa", "1"], "unknown option --alhpa", "--alpha"),
        (["perplexity", "a.txt", "--polcy", "h2o"], "unknown option --polcy", "Did you mean --policy?"),
        (["verify", "--polici", "h2o"], "unknown option --polici", "Did you mean --policy?"),
        (["trace", "--modl", "demo", "a.txt"], "unknown option --modl", "Did you mean --model?"),
        (["trace", "--zzzz", "a.txt"], "unknown option --zzzz", "See: kvscope trace --help"),
        (["repaly"], "unknown command repaly", "replay"),
        (["gate", "trian"], "unknown command trian", "Did you mean train?"),
        (["zzz"], "unknown command zzz", "See: kvscope --help"),
        (["replay", "--policy", "tova", "--alpha", "0.7"], "--alpha", "a2sf"),
        (["replay", "--policy", "a2sf", "--alpah", "0.7"], "--alpah", "alpha"),
        (["replay", "--policy", "a2sf", "--bugdet", "20%"], "--bugdet", "--budget"),
        (["replay", "--policy", "a2sf", "--alpha", "much"], "much", "kvscope policies a2sf"),
        (["replay", "--policy", "a2sf", "--alpha", "7"], "alpha", "1"),
        (["replay", "--policy", "a2sf", "--alpha"], "--alpha has no value", "--alpha VALUE"),
        (["replay", "--policy", "a2sf:alpha"], "alpha", "name=value"),
        (["replay", "--policy", "a2sf:gamma=1"], "gamma", "alpha"),
        (["replay", "--policy", "a2sf", "--policy", "a2sf"], "twice", "once"),
        (["replay", "--policy", "a2sf", "--budget", "0"], "'0'", "20%"),
        (["replay", "--policy", "a2sf", "--budget", "1.0"], "1.0", "20%"),
        (["replay", "--policy", "a2sf", "--budget", "120%"], "120%", "20%"),
        (["replay", "--policy", "a2sf", "--budget", ","], "no budget", "20%"),
        (["replay", "--policy", "a2sf", "--prefill", "half"], "half", "--help"),
        (["replay", "--policy", "a2sf", "--device", "abacus"], "abacus", "cpu"),
        (["replay", "--policy", "nowhere.py:Mine"], "nowhere.py", "path/to/file.py:"),
        (["replay", "--policy", "streaming-llm", "--sinks", "3", "--budget", "2"], "protects", "budget"),
        (["replay", "a", "b", "--policy", "a2sf"], "two traces", "one trace"),
        (["policies", "h20"], "h20", "h2o"),
        (["polices"], "unknown command polices", "Did you mean policies?"),
        (["diff", "one"], "NEW", "--help"),
        (["diff", "a", "b", "--tolerance", "much"], "much", "0.01"),
        (["trace", "--model", "demo"], "PROMPT", "--help"),
        (["trace", "p.txt"], "--model", "--help"),
        (["trace", "--model", "demo", "--layers", "x", "p.txt"], "'x'", "--layers 0,3"),
        (["trace", "--model", "demo", "--store", "rows", "p.txt"], "'rows'", "maps+vectors"),
        (["replay", "--policy", "a2sf", "-o", ""], "-o", "-o NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(run: Run, small: Path, arguments: list[str], what: str, todo: str) -> None:
    Path("p.txt").write_text("Once upon a time")
    done = run(*arguments)
    said = done.two_lines()
    assert done.status == 2
    assert what in said[0]
    assert todo in said[1]
    assert done.out == ""
    assert not list(Path().glob("reports/*"))


@pytest.mark.parametrize(
    ("arguments", "what", "status"),
    [
        (["replay", "--policy", "a2sf"], "traces", 1),
        (["replay", "nothing", "--policy", "a2sf"], "nothing", 1),
        (["info"], "traces", 1),
        (["info", "nothing"], "nothing", 1),
        (["report"], "reports", 1),
        (["report", "nothing"], "nothing", 1),
        (["diff", "OLD", "NEW"], "OLD", 1),
        (["import", "nothing.npz", "--prompt-length", "4"], "nothing.npz", 2),
        (["trace", "--model", "demo", "nothing.txt"], "nothing.txt", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_empty_folder(run: Run, arguments: list[str], what: str, status: int) -> None:
    done = run(*arguments)
    assert done.status == status
    assert what in done.two_lines()[0]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(("command", "make"), [("info", "kvscope trace"), ("report", "kvscope replay")])
def test_where_nothing_is_yet_the_first_step_is_said(run: Run, command: str, make: str) -> None:
    assert make in run(command, "nothing").two_lines()[1]


def test_an_existing_output_is_refused_before_anything_is_loaded(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvscope.model.compile", None)
    Path("p.txt").write_text("Once upon a time")
    assert "exists" in run("trace", "--model", "demo", "p.txt", "-o", "small").two_lines()[0]


def test_the_nearest_trace_is_suggested(run: Run, small: Path) -> None:
    assert "small" in run("info", "smal").two_lines()[1]


def test_empty_prompt(run: Run) -> None:
    Path("empty.txt").write_text("  \n")
    done = run("trace", "--model", "demo", "empty.txt")
    assert done.status in (1, 2)
    assert "empty.txt" in done.two_lines()[0]
    assert not list(Path().glob("traces/*"))


def test_prompt_longer_than_the_context(run: Run) -> None:
    Path("long.txt").write_text("Alice was beginning to get very tired. " * 2000)
    done = run("trace", "--model", "demo", "long.txt")
    assert done.status in (1, 2)
    assert any(char.isdigit() for char in done.two_lines()[0])
    assert not list(Path().glob("traces/*"))


@pytest.mark.parametrize("model", ["no-such-model", "nobody/no-such-model", "lama2-7b", "./no-such-folder"])
def test_unknown_model(run: Run, model: str) -> None:
    Path("p.txt").write_text("Once upon a time")
    done = run("trace", "--model", model, "p.txt")
    assert done.status in (1, 2)
    assert model in done.two_lines()[0]
    assert not list(Path().glob("traces/*"))


def test_existing_outputs_are_left_alone(run: Run, small: Path, npz: Path) -> None:
    before = {file: file.read_bytes() for file in small.rglob("*") if file.is_file()}
    done = run("import", npz, "--prompt-length", "6", "-o", "small")
    assert done.status == 1
    assert "--force" in done.two_lines()[1]
    assert {file: file.read_bytes() for file in small.rglob("*") if file.is_file()} == before

    assert run("replay", "--policy", "a2sf", "-o", "mine", "-q").status == 0
    done = run("replay", "--policy", "tova", "-o", "mine")
    assert done.status == 1
    assert "reports/mine" in done.two_lines()[0]
    assert run("replay", "--policy", "tova", "-o", "mine", "--force", "-q").status == 0
    assert "tova" in Path("reports/mine/run.json").read_text()

    assert run("report", "-o", "page").status == 0
    done = run("report", "-o", "page")
    assert done.status == 1
    assert "page.html" in done.two_lines()[0]
    assert run("report", "-o", "page", "--force").status == 0


@pytest.mark.parametrize("folder", ["traces", "reports"])
def test_a_folder_that_cannot_be_written(run: Run, small: Path, npz: Path, folder: str) -> None:
    """A file is in the way where the folder should be: permissions do not hold for root, this does."""
    kept = small.rename("elsewhere")
    shutil.rmtree("traces", ignore_errors=True)
    Path(folder).write_text("not a folder")
    done = run("import", npz, "--prompt-length", "6") if folder == "traces" else run("replay", kept, "--policy", "a2sf")
    assert done.status == 1
    assert folder in done.two_lines()[0]
    assert Path(folder).read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(run: Run, npz: Path) -> None:
    Path("traces").mkdir(mode=0o555)
    done = run("import", npz, "--prompt-length", "6")
    assert done.status == 1
    assert "ermission" in done.two_lines()[0]


def test_a_trace_cut_in_half(run: Run, small: Path) -> None:
    file = next((small / "attention").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for command in (["info", "small"], ["replay", "small", "--policy", "a2sf"]):
        done = run(*command)
        assert done.status == 1
        assert file.name in done.two_lines()[0]
        assert "damaged" in done.two_lines()[0]
    assert not list(Path().glob("reports/*"))


def test_a_trace_that_lacks_a_file(run: Run, small: Path) -> None:
    file = next((small / "attention").glob("*.parquet"))
    file.unlink()
    done = run("info", "small")
    assert done.status == 1
    assert file.name in done.two_lines()[0]


def test_a_flipped_bit_is_found_by_verify(run: Run, small: Path) -> None:
    assert run("info", "small", "--verify").status == 0
    file = next((small / "attention").glob("*.parquet"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = run("info", "small", "--verify")
    assert done.status == 1
    assert "damaged" in done.two_lines()[0]
    assert file.name in done.two_lines()[0]


def test_versions_and_kinds_of_trace(run: Run, small: Path) -> None:
    said = set()
    for changes in ({"schema": 99}, {"schema": 0}, {"complete": False}, {"kind": "something"}):
        original = (small / "trace.json").read_text()
        edit_header(small, **changes)
        done = run("info", "small")
        assert done.status == 1
        said.add(done.two_lines()[0])
        (small / "trace.json").write_text(original)
    (small / "trace.json").write_text("{")
    said.add(run("info", "small").two_lines()[0])
    (small / "trace.json").unlink()
    said.add(run("info", "small").two_lines()[0])
    assert len(said) == 6, "each of these has a message of its own"
    assert any("newer" in line for line in said)
    assert any("older" in line for line in said)
    assert any("incomplete" in line for line in said)


def test_what_was_left_half_written_is_called_incomplete(run: Run, small: Path) -> None:
    edit_header(small, complete=False)
    small.rename("traces/small.incomplete")
    for name in ("small", "small.incomplete", "traces/small"):
        done = run("info", name)
        assert done.status == 1
        assert "incomplete" in done.two_lines()[0]
    assert "no complete trace" in run("info").two_lines()[0]


def test_the_newest_trace_is_a_whole_one(run: Run, small: Path, npz: Path) -> None:
    assert run("import", npz, "--prompt-length", "6", "-o", "later", "-q").status == 0
    edit_header(Path("traces/later"), complete=False)
    done = run("info")
    assert done.status == 0
    assert "traces/small" in done.err


def test_a_replay_cut_in_half(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "a2sf", "-o", "mine", "-q").status == 0
    file = Path("reports/mine/residency.parquet")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = run("report", "mine")
    assert done.status == 1
    assert "residency.parquet" in done.two_lines()[0]
    assert not list(Path().glob("reports/*.html"))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "A file has the name of a folder"),
    ],
)
def test_what_the_file_system_refuses(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "traces/small/trace.json")

    monkeypatch.setattr("kvscope.trace.reader.open_trace", refuse)
    done = run("info", "small")
    assert done.status == 1
    assert done.two_lines()[0] == f"traces/small/trace.json: {os.strerror(number)}"
    assert expected in done.two_lines()[1]


def test_our_own_mistakes_show_their_traceback(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("kvscope.trace.reader.open_trace", broken)
    with pytest.raises(ZeroDivisionError):
        run("info", "small")

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", str(Path(app_module.__file__).parent / "template.html"))

    monkeypatch.setattr("kvscope.trace.reader.open_trace", missing)
    with pytest.raises(FileNotFoundError):
        run("info", "small")


def test_interrupted(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvscope.trace.reader.open_trace", stop)
    done = run("info", "small")
    assert done.status == 130
    assert done.two_lines()[0] == "interrupted"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m kvscope policies | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "1")


def test_killed_while_tracing_never_passes_for_a_trace(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Alice was beginning to get very tired of sitting by her sister. " * 8)
    process = subprocess.Popen(
        [sys.executable, "-m", "kvscope", "trace", "--model", "demo", "--max-new-tokens", "700", "p.txt"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if list(tmp_path.glob("traces/*.incomplete/attention/*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait(60) == -signal.SIGKILL, "it was over before it could be killed"
    left = [path.name for path in (tmp_path / "traces").iterdir()]
    assert left == ["p-demo.incomplete"]
    done = subprocess.run(
        [sys.executable, "-m", "kvscope", "info", "traces/p-demo.incomplete"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "incomplete" in done.stderr


def test_status_of_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvscope", "info", "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert run_command(["--help"]) == 0


def test_a_parameter_that_resembles_an_option_is_no_mistake() -> None:
    """`--recent` sets parameters of policies, and a file's policy may have any parameter."""
    require_spelt(["--recent", "3", "--output", "a"], ["--recents", "--output"])
    require_spelt(["--policy", "own.py:Mine", "--polcy", "3"], ["--policy"])
    require_spelt(["--", "--polcy"], ["--policy"])
    with pytest.raises(UsageError, match="--polcy"):
        require_spelt(["--policy", "h2o", "--polcy", "3"], ["--policy"])
