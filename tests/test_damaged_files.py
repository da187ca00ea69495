"""A sample of `tools/damaged_files.py`: no damaged gate, checkpoint, tuning or baseline is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvscope.core.errors import ModelError
from kvscope.gates.module import load_gate
from tools import damaged_files
from tools.campaign import BAD


@pytest.mark.slow
def test_a_sample_of_damaged_files() -> None:
    found, wrong = damaged_files.campaign(300, seed=7)
    assert wrong == []
    assert {name.split(":")[0] for name in found} == {"gate", "checkpoint", "tuned", "baseline"}
    assert sum(counts["refused"] for counts in found.values()) > 250


def test_another_result_is_noticed(tmp_path: Path) -> None:
    text = damaged_files.File(b"text " * 20, lambda path: path.read_bytes().hex(), (damaged_files.flip_bit,))
    _, _, outcome, _ = damaged_files.run_case(1, 0, {"text": text}, {"text": text.content.hex()}, tmp_path)
    assert outcome == BAD[0]


def test_the_bundled_gate_has_a_checksum(tmp_path: Path) -> None:
    """It was written before gates had one: a flipped bit changed its decisions."""
    whole = (damaged_files.ROOT / "kvscope" / "model" / "demo" / "gate.safetensors").read_bytes()
    (tmp_path / "gate").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match="checksum"):
        load_gate(str(tmp_path / "gate"))
