"""The output that README.md shows is what its commands print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def test_the_output_in_the_readme_is_real(tmp_path: Path) -> None:
    found = importlib.util.spec_from_file_location("readme_output", ROOT / "tools" / "readme_output.py")
    assert found is not None and found.loader is not None
    tool = importlib.util.module_from_spec(found)
    found.loader.exec_module(tool)
    block, command, shown = tool.parts((ROOT / "README.md").read_text(encoding="utf-8"))
    printed = tool.run(block, command, tmp_path)
    again = "run: python tools/readme_output.py"
    assert NUMBER.sub("N", printed).split() == NUMBER.sub("N", shown).split(), again
    # another processor may round the last digit in another way
    expected = [float(number) for number in NUMBER.findall(shown)]
    assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(expected, abs=0.01), again
    assert len(expected) > 10
