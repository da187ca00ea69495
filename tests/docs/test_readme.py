"""The outputs that README.md shows are what its commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tools import readme_output

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
AGAIN = "run: python tools/readme_output.py"


def test_the_outputs_in_the_readme_are_real(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    now = readme_output.outputs(readme_output.with_outputs(text, tmp_path))
    kept = readme_output.outputs(text)
    assert [command for command, _ in kept] == ["trace", "replay", "report", "diff"], "the four lines"
    for (command, printed), (_, shown) in zip(now, kept, strict=True):
        assert shown.strip(), command
        assert NUMBER.sub("N", printed).split() == NUMBER.sub("N", shown).split(), AGAIN
        # another processor may round the last digit in another way
        expected = [float(number) for number in NUMBER.findall(shown)]
        assert [float(number) for number in NUMBER.findall(printed)] == pytest.approx(expected, abs=0.01), AGAIN


def test_an_output_is_that_of_the_command_above_it(tmp_path: Path) -> None:
    page = """<!-- these blocks are run by the tests -->
```sh
kvscope --version
```
<!-- output of kvscope policies, written by a tool -->
```text
old
```
<!-- these blocks are run by the tests -->
```sh
kvscope policies h2o
```
<!-- output of kvscope policies, last 2 lines, written by a tool -->
```text
```
"""
    (tmp_path / "policies.out").write_text("first\nsecond  \n", encoding="utf-8")
    (first, second) = readme_output.outputs(readme_output.with_outputs(page, tmp_path))
    assert first == ("policies", "first\nsecond\n")
    assert second[0] == "policies" and second[1].count("\n") == 2 and "first" not in second[1]
