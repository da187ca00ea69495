"""Rewrite the snapshots of what commands print on terminals of 80, 120 and 200 columns.

``python tools/snapshots.py`` after an intended change of an output; read the difference before it is committed.
``tests/cli/test_snapshots.py`` compares them. Only outputs that are the same on every machine are among them.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "snapshots"
WIDTHS = (80, 120, 200)
COMMANDS = {
    "help": "--help",
    "help-trace": "trace --help",
    "help-replay": "replay --help",
    "help-perplexity": "perplexity --help",
    "help-diff": "diff --help",
    "policies": "policies",
    "policies-a2sf": "policies a2sf",
    "diff": "diff reports/example reports/example",
    "trace": "trace --model demo traces/example.txt",
    "replay": "replay example --policy all --budget 20%,40% --perplexity",
    "replay-misspelt": "replay --polcy h2o",
}


def _trace() -> None:
    from kvscope.cli.info import show
    from kvscope.trace.reader import open_trace

    show(open_trace(Path("traces/example")), said=True)


def _replay() -> None:
    from kvscope.cli.summary import show
    from kvscope.results.store import open_replay

    show(open_replay(Path("reports/example")))


# Of commands that compute: what they print of the committed example, whose figures are the same on every machine.
OF_EXAMPLE = {"trace": _trace, "replay": _replay}


def main() -> int:
    """Write every snapshot and return 0."""
    FOLDER.mkdir(exist_ok=True)
    for file, text in snapshots():
        file.write_text(text, "utf-8")
    return 0


def snapshots() -> list[tuple[Path, str]]:
    """Return the file of every snapshot, and what its command prints now."""
    return [(FOLDER / f"{name}-{width}.txt", printed(name, width)) for name in COMMANDS for width in WIDTHS]


def printed(name: str, width: int) -> str:
    """Return what a command of `COMMANDS` prints on stdout and then on stderr, without spaces at the ends of lines."""
    from kvscope.cli.app import run

    streams, before, folder = (io.StringIO(), io.StringIO()), os.environ.get("COLUMNS"), Path.cwd()
    os.environ["COLUMNS"] = str(width)
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            if name in OF_EXAMPLE:
                OF_EXAMPLE[name]()
            else:
                run(shlex.split(COMMANDS[name]))
    finally:
        os.chdir(folder)
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    text = "".join(stream.getvalue() for stream in streams)
    return "\n".join([f"$ kvscope {COMMANDS[name]}", *(line.rstrip() for line in text.splitlines())]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
