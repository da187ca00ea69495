"""Compiling kernels for a GPU where there is none: in a process of its own, which does not interpret them."""

import os
import subprocess
import sys
from pathlib import Path

import kvscope


def require_compiles(script: str, folder: Path) -> None:
    """Run a script that compiles kernels, with its cache in `folder`; its error fails the test."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(kvscope.__file__).parents[1])}
    (folder / "made.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(folder / "made.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
