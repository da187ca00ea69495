"""A small sample of `tools/surroundings.py`: a command that cannot write says so and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import surroundings

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "surroundings.json"
    sample = ["--seed", "7", "--scale", "0.05", "--only", "largest file", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "tools/surroundings.py", *sample],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text())["conditions"]["largest file"]
    assert sum(counts.values()) == len(surroundings.commands())
    assert counts["refused"] > 5


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (0, "next: kvscope report\n", "done"),
        (1, "a note\nerror: full\nFree some space.\n", "refused"),
        (1, "error: full\n", "not two lines"),
        (1, "", "not two lines"),
        (1, "Traceback (most recent call last):\n  x\nerror: full\nFree some space.\n", "traceback"),
        (-6, "terminate called\n", "ended by signal 6"),
        (0, "error: full\nFree some space.\n", "done, and said"),
    ],
)
def test_the_end_of_a_command_is_judged(status: int, said: str, expected: str) -> None:
    assert surroundings.verdict(status, said).startswith(expected)
