"""What is installed: the wheel holds everything that lies in the package, and the versions agree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from kvscope import __version__

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """Prevents a package that works in a clone and lacks the bundled model or the page's scripts once installed."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "kvscope").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert package <= names, package - names
    assert {"kvscope/py.typed", "kvscope/model/demo/prompt.txt"} <= names
    assert any(name.startswith("kvscope/model/demo/") and name.endswith(".safetensors") for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "tools/", "traces/")) for name in names)
    assert f"kvscope-{__version__}" in wheel.name


def test_every_dependency_has_an_exact_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    exact = {re.sub(r"[-_.]+", "-", name).lower() for name in pinned}
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    for requirement in wanted:
        assert re.split(r"[<>=!~ ]", requirement)[0].lower() in exact, requirement
