"""The same input gives the same bytes: twice, with another hash seed, with two threads, without extras.

What a replay says of its own run, when and how long, is set to one value before it is exported and reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("numba", "triton", "accelerate", "rouge_score", "hypothesis", "duckdb", "polars", "playwright")
SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
    "two threads, another hash seed": {"OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "2"},
    "no extras, so no kernels": {"OMP_NUM_THREADS": "1", "WITHOUT": ",".join(EXTRAS)},
}
POLICIES = (
    "h2o",
    "tova",
    "snapkv",
    "vatp",
    "a2sf:alpha=0.5",
    "keyformer",
    "streaming-llm",
    "random",
    "belady",
    "quest",
)

CHILD = """
import hashlib, importlib.abc, json, os, sys
from pathlib import Path

without = set(filter(None, os.environ.get("WITHOUT", "").split(",")))

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in without:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from kvscope.cli.app import run
from kvscope.core.seal import sealed

def command(*arguments):
    assert run([*arguments, "-q"]) == 0, arguments

def timeless(name):
    file = Path("reports") / name / "run.json"
    data = json.loads(file.read_text())
    data |= {"created": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
    file.write_text(json.dumps(sealed(data)))

trace, *policies = sys.argv[1:]
command("replay", trace, *(part for one in policies for part in ("-p", one)), "-b", "20%,48", "-o", "replay")
timeless("replay")  # before `score`, which copies it
command("score", "replay", "-o", "scored")
timeless("scored")
for form in ("csv", "parquet", "arrow"):
    command("export", "replay", "--format", form, "-o", form)
command("export", "replay", "--per", "run", "--long", "-o", "means")
command("report", "replay", "scored", "-o", "page")
used = sorted({module.split(".")[0] for module in sys.modules} & {"numba", *without})
written = [file for file in sorted(Path("reports").rglob("*.*")) if file.is_file()]
files = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
import torch
print(json.dumps([used, torch.get_num_threads(), files]))
"""


def digests(folder: Path, setting: dict[str, str]) -> tuple[list[str], int, dict[str, str]]:
    """Return which extras were imported, the number of threads, and the digest of every file that was written."""
    folder.mkdir()
    (folder / "traces").symlink_to(ROOT / "traces")
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KVSCOPE_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "example", *POLICIES],
        cwd=folder,
        env={**known, "PYTHONPATH": str(ROOT), **setting},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    used, threads, files = json.loads(done.stdout.splitlines()[-1])
    return used, threads, files


@pytest.mark.slow
def test_the_same_bytes_whatever_the_setting(tmp_path: Path) -> None:
    found = {}
    for number, (name, setting) in enumerate(SETTINGS.items()):
        used, threads, found[name] = digests(tmp_path / str(number), setting)
        assert ("numba" in used) == ("no extras" not in name), (name, used)
        assert threads == (2 if "two threads" in name else 1)
    first = found["one thread"]
    kinds = {Path(name).suffix for name in first}
    assert {".parquet", ".json", ".csv", ".arrow", ".html"} <= kinds
    assert len(first) > 15
    for name, files in found.items():
        assert files.keys() == first.keys()
        assert [file for file in files if files[file] != first[file]] == [], name
