"""Closed streams, other encodings, and names that a terminal would take for a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvscope.core.printable import one_line, printable
from tests.cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
KVSCOPE = f"{sys.executable} -m kvscope"

# Commands between words "+", up to the first that fails, in one process: libraries are loaded once for all of them.
SEVERAL = """
import itertools, sys
from kvscope.cli.app import prepare_process, run
prepare_process()
commands = (list(words) for plus, words in itertools.groupby(sys.argv[1:], "+".__eq__) if not plus)
sys.exit(next(filter(None, map(run, commands)), 0))
"""


def shell(command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)


def test_control_characters_are_shown() -> None:
    assert printable("a\x1b[31mb\x07\x9b\r") == "a\\x1b[31mb\\x07\\x9b\\x0d"
    assert printable("\u202eabc\u2066\udc80\u2028") == "\\u202eabc\\u2066\\udc80\\u2028"
    assert printable("tab\tand\nline, 漢字, é, 👍") == "tab\tand\nline, 漢字, é, 👍"
    assert one_line("h2o\n::error::x\x1b") == "h2o :\\:error::x\\x1b"


def test_no_line_begins_like_a_command_of_a_ci_system() -> None:
    """GitHub runs a line of the log that begins with one, after blanks too: a cell of a table is enough."""
    assert printable("::error::x\n  ::a::\n##[error]x") == ":\\:error::x\n  :\\:a::\n#\\#[error]x"
    assert printable("\u2003\u00a0::a::") == "\u2003\u00a0:\\:a::", "GitHub omits blanks of every kind"
    assert printable("a::b::c ## [d]") == "a::b::c ## [d]"
    assert printable("x ##[add-mask]y ##vso[z]") == "x #\\#[add-mask]y #\\#vso[z]", "they run anywhere in a line"
    assert printable("x ::Warning file=a::b") == "x :\\:Warning file=a::b", "a line may be wrapped before it"


@pytest.mark.parametrize("name", ["\x1b[31mred", "[/x]", "[bold]x", "\x1b]0;title\x07", "a\r\nb", "\u202eabc"])
@pytest.mark.parametrize("command", ["info", "report", "export", "diff", "replay"])
def test_a_strange_name_is_shown_in_the_error(run: Run, command: str, name: str) -> None:
    more = {"diff": [name], "replay": ["-p", "h2o"]}.get(command, [])
    done = run(command, name, *more)
    assert done.status in (1, 2)
    what, todo = done.two_lines()
    assert printable(" ".join(name.split())) in what
    assert not set("\x1b\x07\r\u202e") & set(what + todo)


def test_closed_streams_change_no_status(tmp_path: Path) -> None:
    done = shell(f"{KVSCOPE} policies >&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"{KVSCOPE} policies 2>&- | head -n 3")
    assert "policy" in done.stdout
    done = shell(f"{KVSCOPE} info nothing <&- >&- 2>&-", tmp_path)
    assert done.returncode == 1


def test_a_file_is_not_opened_in_the_place_of_a_closed_stream() -> None:
    program = "from kvscope.cli.streams import open_streams; open_streams(); print(open('/dev/null').fileno() > 2)"
    done = shell(f'{sys.executable} -c "{program}" 2>&- <&-')
    assert done.stdout == "True\n"


def test_a_full_disk_for_stdout_is_an_error() -> None:
    done = shell(f"{KVSCOPE} policies > /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: cannot write the output: No space left on device"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_other_encodings_of_the_terminal(encoding: str) -> None:
    done = shell(f"PYTHONIOENCODING={encoding} {KVSCOPE} policies && PYTHONIOENCODING={encoding} {KVSCOPE} info 漢字")
    assert done.returncode == 1
    assert "a2sf" in done.stdout
    assert done.stderr.splitlines()[0].startswith("error: no trace \\u6f22\\u5b57")


def test_an_interruption_of_the_first_import_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    done = shell(f"PYTHONPATH={tmp_path} {KVSCOPE} --help")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_interruption_that_python_cannot_raise_is_not_lost() -> None:
    program = (
        "import signal, time; from kvscope.cli import app\n"
        "class Slow:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "def work(**_):\n"
        "    Slow(); time.sleep(5); return 0\n"
        "app.prepare_process(); app.program = lambda words: work; raise SystemExit(app.run([]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.splitlines()[0] == "error: interrupted"
    assert len(done.stderr.splitlines()) == 2


def test_a_deleted_folder_is_two_lines(tmp_path: Path) -> None:
    """The libraries of torch end the process there, with a line of their own and status 2."""
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && {KVSCOPE} replay /nowhere -p h2o", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: the current folder was deleted", "Change to a folder that exists: cd"]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """pyarrow takes a path only if it can be encoded as UTF-8: a Linux file name is any bytes."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a \xff"))
    shutil.copytree(ROOT / "traces" / "example", folder / "traces" / "e")
    # The C locale makes such names of all that are not ASCII.
    commands = " + ".join(
        (
            "replay e -p h2o --budget 20% -o 'r\xe9' -q",
            "export 'r\xe9' --format csv -o csv -q",
            "export 'r\xe9' --format arrow -o arrow -q",
            "export 'r\xe9' -o 't\xe9' -q",
            "report 'r\xe9' -q",
        )
    )
    done = shell(f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {sys.executable} -c '{SEVERAL}' {commands}", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(item.name for item in (folder / "reports").iterdir()) == ["arrow", "csv", "r.html", "r\xe9", "t\xe9"]


@pytest.mark.parametrize("kilobytes", [500_000, 700_000, 1_000_000, 2_000_000])
def test_a_limit_of_memory_that_libraries_exceed_is_two_lines(tmp_path: Path, kilobytes: int) -> None:
    shutil.copytree(ROOT / "traces" / "example", tmp_path / "traces" / "e")
    done = shell(f"ulimit -v {kilobytes}; {KVSCOPE} replay e -p h2o --budget 20% -q", tmp_path)
    assert "Traceback" not in done.stderr
    if done.returncode:  # without numba, 2 GB suffice
        assert done.returncode == 1
        assert done.stderr.splitlines()[-2] == "error: there is too little memory to load the libraries"
