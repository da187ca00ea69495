"""Rebuild the data that is committed: an example trace, its replay and report, and the baseline of the CI check.

python tools/examples.py [--keep-trace]

With --keep-trace the trace stays as it is: another processor records other weights in bfloat16.

traces/example.txt is recorded as traces/example and replayed as reports/example and reports/example.html; the page has
the spans in SPANS. The replay of .github/workflows/fidelity.yml becomes tests/data/baseline.json. All are made with the
ordinary commands in the root of the repository, so that they contain no absolute path. bfloat16 halves the size of the
vectors, most of a trace this short; the closed loop runs in float32. Pictures of the report: tools/screenshots.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import yaml

from kvscope.cli.app import run

ROOT = Path(__file__).resolve().parent.parent
SPANS = (
    "fact=text:Note: Clara holds 583.",
    "other fact=text:Note: Victor keeps 264.",
    "question=text:what holds Clara?",
)
# Policies that need no more than the trace has, in the order of the page.
POLICIES = (
    "a2sf snapkv ada-kv attention-gate belady cake full h2o ideal key-norm keydiff keyformer lagkv lru morphkv"
    " pyramidkv quest r-kv random recycled-attention refreshkv roco scissorhands streaming-llm tova vatp window"
)
TRACE = (
    "trace --model demo traces/example.txt --output example --max-new-tokens 16 --store maps+vectors --dtype bfloat16"
    " --force"
)
EXAMPLES = (
    f"replay example {' '.join(f'--policy {name}' for name in POLICIES.split())} --budget 20%,40% --perplexity"
    " --dtype float32 --output example --force",
    f"report example --output example --force {shlex.join(f'--span={span}' for span in SPANS)}",
)


def main() -> int:
    """Return the exit status of the first command that fails, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-trace", action="store_true")
    recorded = () if parser.parse_args().keep_trace else (TRACE,)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for command in (*recorded, *EXAMPLES, *regression_check(Path(folder) / "check")):
            print(f"kvscope {command}")
            status = run([*shlex.split(command), "--quiet"])
            if status:
                return status
    return 0


def regression_check(replay: Path) -> tuple[str, str]:
    """Return the commands that make the replay of the CI regression check, and accept it as the new baseline."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "fidelity.yml").read_text(encoding="utf-8"))
    env = workflow["env"]
    Path(env["BASELINE"]).unlink(missing_ok=True)  # one of another trace is never updated
    return (
        f"replay {env['TRACE']} {env['POLICIES']} --budget {env['BUDGETS']} --output {replay}",
        f"diff {env['BASELINE']} {replay} --update",
    )


if __name__ == "__main__":
    sys.exit(main())
