"""Rebuilds what git holds of data: an example trace, its replay, its report, and the baseline of the fidelity gate.

python tools/examples.py

traces/example.txt becomes traces/example, that becomes reports/example and reports/example.html and, as
.github/workflows/fidelity.yml says, tests/data/baseline.json. All are made with the commands that a user has, from the
root of the repository, so that no path in them tells of the machine. bfloat16 halves the vectors, which are most of a
trace this short; the closed loop runs in float32. Pictures of the report: tools/screenshots.py
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

import yaml

from kvscope.cli.app import run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = (
    "trace --model demo traces/example.txt --output example --max-new-tokens 16 --store maps+vectors --dtype bfloat16"
    " --force",
    "replay example --policy all --budget 20%,40% --perplexity --dtype float32 --output example --force",
    "report example --output example --force",
)


def main() -> int:
    """Return the exit status of the first command that fails, or 0."""
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for command in (*EXAMPLES, *gate(Path(folder) / "gate")):
            print(f"kvscope {command}")
            status = run([*shlex.split(command), "--quiet"])
            if status:
                return status
    return 0


def gate(replay: Path) -> tuple[str, str]:
    """Return the commands that make the replay of the fidelity gate, and accept it as the new baseline."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "fidelity.yml").read_text(encoding="utf-8"))
    env = workflow["env"]
    Path(env["BASELINE"]).unlink(missing_ok=True)  # one of another trace is never updated
    return (
        f"replay {env['TRACE']} {env['POLICIES']} --budget {env['BUDGETS']} --output {replay}",
        f"diff {env['BASELINE']} {replay} --update",
    )


if __name__ == "__main__":
    sys.exit(main())
