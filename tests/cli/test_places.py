"""Where things are found and where they go: nothing is overwritten, nothing lands in a strange place."""

import json
import os
import socket
from pathlib import Path

import pytest

from kvscope.cli.places import TRACES, find_trace, joined, place, readable
from kvscope.core.errors import KvscopeError, UsageError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_first_free_name_is_taken() -> None:
    assert place(TRACES, None, "a", force=False) == Path("traces/a")
    Path("traces/a").mkdir(parents=True)
    assert place(TRACES, None, "a", force=False) == Path("traces/a-2")
    left, writer = Path("traces/a-2.incomplete"), {"pid": os.getppid(), "host": socket.gethostname()}
    left.mkdir()
    assert place(TRACES, None, "a", force=False) == Path("traces/a-2"), "nobody writes it any more"
    (left / "trace.json").write_text(json.dumps({"writer": writer}))
    assert place(TRACES, None, "a", force=False) == Path("traces/a-3"), "a running process writes it"
    Path("traces/a-2").mkdir()
    Path("traces/a-3").symlink_to("nowhere")
    assert place(TRACES, None, "a", force=False) == Path("traces/a-4")


def test_a_bare_name_lands_in_the_folder_and_a_path_stays_a_path() -> None:
    assert place(TRACES, "mine", "a", force=False) == Path("traces/mine")
    assert place(TRACES, "./mine", "a", force=False) == Path("mine")
    assert place(TRACES, "there/mine", "a", force=False) == Path("there/mine")
    assert place(TRACES, "/else/mine", "a", force=False) == Path("/else/mine")
    assert place(TRACES, "page", "a", force=False, suffix=".html") == Path("traces/page.html")
    assert place(TRACES, "v1.2", "a", force=False, suffix=".html") == Path("traces/v1.2.html")
    assert place(TRACES, "page.html", "a", force=False, suffix=".html") == Path("traces/page.html")


def test_what_exists_is_refused_unless_forced() -> None:
    Path("traces/mine").mkdir(parents=True)
    with pytest.raises(KvscopeError, match=r"traces/mine exists already"):
        place(TRACES, "mine", "a", force=False)
    assert place(TRACES, "mine", "a", force=True) == Path("traces/mine")


def test_a_folder_of_the_same_name_does_not_hide_a_trace() -> None:
    """Prevents that a trace called like its model's folder cannot be named."""
    Path("llama").mkdir()
    assert find_trace("llama") == Path("llama"), "there is no trace of that name"
    Path("traces/llama").mkdir(parents=True)
    Path("traces/llama/trace.json").touch()
    assert find_trace("llama") == Path("traces/llama")
    Path("llama/trace.json").touch()
    assert find_trace("llama") == Path("llama"), "a path goes first"


def test_no_name_is_refused() -> None:
    with pytest.raises(UsageError):
        place(TRACES, " ", "a", force=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a b/c", "a-b-c"),
        ("../up", "up"),
        ("", "unnamed"),
        ("...", "unnamed"),
        ("ü_1+2", "ü_1+2"),
        ("x" * 200, "x" * 80),
    ],
)
def test_readable(name: str, expected: str) -> None:
    assert readable(name) == expected


def test_joined() -> None:
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"]) == "a+b+c"
    assert joined(["a", "b", "c", "d"]) == "a+3-more"
