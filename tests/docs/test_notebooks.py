"""The notebooks of examples/ run from the first cell to the last, and are committed without outputs."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.docs.blocks import ROOT

NAMES = ("compare_policies.ipynb", "own_policy.ipynb")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "tools" / "notebooks.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_these_are_the_notebooks(tool: ModuleType) -> None:
    assert tuple(file.name for file in tool.notebooks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(tool: ModuleType, name: str) -> None:
    file = ROOT / "examples" / name
    assert file.read_text(encoding="utf-8") == tool.plain(file), "run: python tools/notebooks.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(tool: ModuleType, name: str) -> None:
    cells = [cell for cell in tool.ran(ROOT / "examples" / name).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert sum(bool(cell.outputs) for cell in cells) >= 5
