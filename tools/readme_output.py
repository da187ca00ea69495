"""Write the output of commands into README.md: what they print in a terminal of 100 columns.

python tools/readme_output.py

Blocks of shell below ``<!-- these blocks are run by the tests -->`` are run one after another in an empty folder. Each
block of text below ``<!-- output of kvscope COMMAND, ... -->`` is what the last such command above it printed on
stdout; with ``last N lines``, without the lines before, as those of ``trace`` with its time and checksum.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from kvscope.cli.app import run as run_command  # noqa: E402
from tests.docs.blocks import commands  # noqa: E402

COLUMNS = 100
RUN = r"<!-- these blocks are run by the tests -->\n```sh\n(?P<script>.*?)```"
OF = r"output of kvscope (?P<command>\w+)(, last (?P<last>\d+) lines)?,[^\n]*"
SHOWN = rf"(?P<before><!-- {OF} -->\n```text\n)(?P<output>.*?)```"
BLOCK = re.compile(f"{RUN}|{SHOWN}", re.DOTALL)


def main() -> int:
    """Return 0 when README.md is written."""
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        written = with_outputs(text, Path(folder))
    page.write_text(written, encoding="utf-8")
    return 0


def outputs(text: str) -> list[tuple[str, str]]:
    """Return each command whose output a page shows, and this output."""
    return [(found["command"], found["output"]) for found in BLOCK.finditer(text) if found["command"]]


def with_outputs(text: str, folder: Path) -> str:
    """Return a page with the outputs that its blocks have now, run in an empty folder."""

    def written(found: re.Match[str]) -> str:
        if found["script"] is not None:
            run(found["script"], folder)
            return found[0]
        return f"{found['before']}{printed(found['command'], folder, int(found['last'] or 0))}```"

    return BLOCK.sub(written, text)


def run(script: str, folder: Path) -> None:
    """Run a block of shell; what each command of kvscope prints on stdout is left in ``COMMAND.out``.

    Commands of kvscope run in this process, so that the libraries are loaded once for all of them. They may exit with
    status 3: it found a difference.
    """
    for command in commands(script):
        words = shlex.split(command, comments=True)
        if words[0] != "kvscope":
            subprocess.run(["bash", "-euc", command], cwd=folder, check=True)
            continue
        with contextlib.chdir(folder), _columns(), contextlib.redirect_stdout(io.StringIO()) as stream:
            status = run_command(words[1:])
        (folder / f"{words[1]}.out").write_text(stream.getvalue(), encoding="utf-8")
        if status not in (0, 3):
            raise RuntimeError(f"{command}: status {status}")


@contextlib.contextmanager
def _columns() -> Iterator[None]:
    """Give terminals `COLUMNS` columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def printed(command: str, folder: Path, last: int = 0) -> str:
    """Return the `last` lines of what the last command of a name has printed, or all of them."""
    lines = (folder / f"{command}.out").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines[-last:])


if __name__ == "__main__":
    sys.exit(main())
