"""No moment at which an older output is lost before the new one has its name: each step is made to fail in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvscope.core.errors import TraceError
from kvscope.core.output import OutputFolder, incomplete, replace_file, writer_of

MEMBERS = r"run\.json|data"


def folder(path: Path, *, force: bool = True) -> OutputFolder:
    return OutputFolder(path, "trace", "run.json", MEMBERS, TraceError, force)


def write(path: Path, content: str) -> OutputFolder:
    output = folder(path)
    (output.work / "run.json").write_text(json.dumps({"writer": output.begin()}))
    (output.work / "data").write_text(content)
    return output


def test_a_new_folder_replaces_an_older_one(tmp_path: Path) -> None:
    write(tmp_path / "a", "old").finish()
    write(tmp_path / "a", "new").finish()
    assert (tmp_path / "a" / "data").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["first rename", "second rename", "removal"])
def test_killed_while_it_replaces_the_older_one_is_whole(tmp_path: Path, step: str) -> None:
    write(tmp_path / "a", "old").finish()
    script = (
        "import os, shutil; from pathlib import Path; from tests.core.test_output_order import write\n"
        f"output = write(Path({str(tmp_path / 'a')!r}), 'new'); rename, count = Path.rename, [0]\n"
        "def dies(self, target):\n"
        "    count[0] += 1\n"
        f"    if count[0] > {['first rename', 'second rename', 'removal'].index(step)}: os._exit(9)\n"
        "    return rename(self, target)\n"
        "Path.rename = dies; shutil.rmtree = lambda *_, **__: os._exit(9)\n"
        "output.finish()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    names = {item.name for item in tmp_path.iterdir()}
    assert (
        names
        == {
            "first rename": {"a", "a.incomplete"},
            "second rename": {"a.replaced", "a.incomplete"},
            "removal": {"a", "a.replaced"},
        }[step]
    )
    expected = "new" if step == "removal" else "old"
    next_one = folder(tmp_path / "a")
    next_one.begin()
    assert (tmp_path / "a" / "data").read_text() == expected
    next_one.abandon()
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_rename_that_fails_gives_the_older_one_its_name_back(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "a", "old").finish()
    output, rename = write(tmp_path / "a", "new"), Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == output.work:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Permission"):
        output.finish()
    assert (tmp_path / "a" / "data").read_text() == "old"


def test_an_error_removes_what_was_written(tmp_path: Path) -> None:
    output = write(tmp_path / "a", "new")
    with pytest.raises(KeyboardInterrupt), output.abandoned_on_error():
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_a_process_that_runs_is_a_writer(tmp_path: Path) -> None:
    output = write(tmp_path / "a", "new")
    header = output.work / "run.json"
    assert writer_of(output.path) is None, "this process is none"
    about = json.loads(header.read_text())
    about["writer"]["pid"] = os.getppid()
    header.write_text(json.dumps(about))
    assert writer_of(output.path) == os.getppid()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    about["writer"]["pid"] = child.pid
    header.write_text(json.dumps(about))
    assert writer_of(output.path) is None
    for damaged in ("", "[" * 100_000, '{"writer": 3}', '{"writer": {"pid": "x", "host": 1}}'):
        header.write_text(damaged)
        assert writer_of(output.path) is None


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "page.html"
    replace_file(file, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert not incomplete(file).exists()
    shutil.rmtree(tmp_path)


def test_a_folder_whose_header_cannot_be_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        folder(tmp_path / "a").begin()
    assert list(tmp_path.iterdir()) == []


RACE = """
import sys, time
from pathlib import Path
from kvscope.core.errors import KvscopeError
from tests.core.test_output_order import folder
from kvscope.core.output import replace_file
path, start, name = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
while time.time() < start:
    pass
for number in range(300):
    replace_file(path / "page", (name * (1000 + 777 * int(name))).encode())
    try:
        output = folder(path / "out")
        output.begin()
    except KvscopeError as error:
        assert "is writing" in str(error), error
        continue
    (output.work / "data").write_text(name)
    assert (output.work / "data").read_text() == name, "another process wrote into the folder"
    output.finish()
"""


def test_two_processes_never_write_one_output_together(tmp_path: Path) -> None:
    """Both would make the folder, or one would remove that of the other before its header says who writes it."""
    (tmp_path / "out").mkdir()
    start = time.time() + 5
    arguments = [sys.executable, "-c", RACE, str(tmp_path), str(start)]
    running = [
        subprocess.Popen([*arguments, name], cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
        for name in "12"
    ]
    assert [process.communicate(timeout=120)[1] for process in running] == ["", ""]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out", "page"]
    assert (tmp_path / "page").read_text() in ("1" * 1777, "2" * 2554)
    assert (tmp_path / "out" / "data").read_text() in ("1", "2")
