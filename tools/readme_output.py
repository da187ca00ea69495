"""Write the output of the quickstart into README.md: what its commands print in a terminal of 100 columns.

python tools/readme_output.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100


def main() -> int:
    """Return 0 when README.md is written."""
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    block, command, _ = parts(text)
    with tempfile.TemporaryDirectory() as folder:
        printed = run(block, command, Path(folder))
    page.write_text(with_output(text, printed), encoding="utf-8")
    print(printed)
    return 0


def parts(text: str) -> tuple[str, str, str]:
    """Return the block of the quickstart, the command whose output is shown, and this output."""
    block = re.search(r"<!-- these blocks are run by the tests -->\n```sh\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"<!-- output of kvscope (\w+), .*? -->\n```text\n(.*?)```", text, re.DOTALL)
    assert block is not None and shown is not None, "README.md has a quickstart and the output of one of its commands"
    return block[1], shown[1], shown[2]


def with_output(text: str, printed: str) -> str:
    """Return the text of README.md with this output."""
    return re.sub(
        r"(<!-- output of kvscope \w+, .*? -->\n```text\n).*?(```)",
        lambda match: match[1] + printed + match[2],
        text,
        flags=re.DOTALL,
    )


def run(block: str, command: str, folder: Path) -> str:
    """Return what a command of a block prints, run in this folder after those before it."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    script = f'kvscope() {{ "$PYTHON" -m kvscope "$@" > "$1.out"; }}\nset -eu\n{block}'
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True)
    lines = (folder / f"{command}.out").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
