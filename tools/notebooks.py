"""Run the notebooks of examples/, and write them without outputs, counts and what an editor adds.

python tools/notebooks.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main() -> int:
    """Return 0 if every notebook ran and is written."""
    for file in notebooks():
        ran(file)
        file.write_text(plain(file), encoding="utf-8")
        print(file.relative_to(ROOT))
    return 0


def notebooks() -> list[Path]:
    """Return the notebooks of the repository."""
    return sorted((ROOT / "examples").glob("*.ipynb"))


def ran(file: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of its cells, run by this Python; a cell that raises ends it."""
    notebook = nbformat.read(file, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


def plain(file: Path) -> str:
    """Return the text of a notebook without its outputs."""
    notebook = nbformat.read(file, as_version=4)
    for number, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    sys.exit(main())
