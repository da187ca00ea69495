"""Damaged folders on the command line: two lines and status 1, `--no-verify`, and `info --verify` of a replay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "traces" / "example", tmp_path / "traces" / "example")
    shutil.copytree(ROOT / "reports" / "example", tmp_path / "reports" / "example")
    return tmp_path


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(bytes(content))


def test_a_flipped_bit_is_refused_and_can_be_ignored(run: Run, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example)
    file = example / "traces" / "example" / "attention" / "layer=001.parquet"
    flip(file, file.read_bytes().rindex(b"parquet-cpp-arrow") + 3)  # the name of the writer, which decides nothing
    done = run("replay", "example", "--policy", "window", "-o", "r", "--quiet")
    assert done.status == 1
    assert done.err.splitlines()[0].endswith("its checksum differs from the recorded one")
    assert len(done.err.splitlines()) == 2
    assert run("replay", "example", "--policy", "window", "-o", "r", "--quiet", "--no-verify").status == 0


def test_info_verifies_a_replay(run: Run, example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example)
    (example / "traces" / "example").rename(example / "traces" / "other")
    done = run("info", "example", "--verify")
    assert done.status == 0 and "every checksum compared" in done.out
    flip(example / "reports" / "example" / "residency.parquet", 1000)
    assert run("info", "reports/example").status == 0, "checksums are compared at the first reading"
    assert run("info", Path("reports/example").resolve()).status == 0, "an absolute path is no name under traces/"
    done = run("info", "reports/example", "--verify")
    assert done.status == 1 and "residency.parquet: its checksum differs" in done.err
