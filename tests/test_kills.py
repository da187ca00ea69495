"""A small sample of `tools/kills.py`: stopped commands leave nothing that passes for a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_stopped_commands_do_no_harm(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, "tools/kills.py", "--seed", "7", "--scale", "0.02", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(out.read_text())["commands"]
    assert {name: sum(found.values()) for name, found in counts.items()} == {
        "trace": 2,
        "replay": 1,
        "report": 1,
        "gate train": 1,
        "perplexity": 1,
    }
