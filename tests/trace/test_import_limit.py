"""A small file that would become large in memory is refused before memory is taken; large and honest ones are read."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.trace.import_files import read_captured
from kvscope.trace.import_limit import ALWAYS, MOST
from kvscope.trace.importer import import_maps
from tests.trace.make import rows_of

ROOT = Path(__file__).parents[2]
SIDE = 46341  # 4.3 GB of 16 bit


def zip_bomb(path: Path) -> None:
    """Write an ``.npz`` of half a megabyte with attention of half a gigabyte of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("attention.npy", "w") as member:
        about = {"descr": "<f2", "fortran_order": False, "shape": (1, 1, 2**14, 2**14)}
        np.lib.format.write_array_header_1_0(member, about)
        for _ in range(2**5):
            member.write(bytes(2**24))


def npy_that_lies(path: Path) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": (1, 1, SIDE, SIDE)}
        )
        file.write(bytes(1000))


def view_of_one_number(path: Path) -> None:
    torch.save({"attentions": torch.ones(1).expand(1, 1, SIDE, SIDE)}, path)


def a_list_many_times(path: Path) -> None:
    part: list[object] = [torch.ones(1)]
    for _ in range(40):
        part = [part, part]
    torch.save({"attentions": part}, path)


def compressed_torch(path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"attentions": torch.zeros(2**28, dtype=torch.uint8)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def safetensors_that_lies(path: Path) -> None:
    about = {"attention": {"dtype": "F16", "shape": [1, 1, SIDE, SIDE], "data_offsets": [0, SIDE * SIDE * 2]}}
    text = json.dumps(about).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))


def safetensors_of_a_huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + b"{" + bytes(1000))


BOMBS = {
    "maps.npz": (zip_bomb, "its arrays 536.9 MB or more: more than 100 times"),
    "maps.npy": (npy_that_lies, "its arrays 4.3 GB or more"),
    "view.pt": (view_of_one_number, "its arrays 8.6 GB or more"),
    "list.pt": (a_list_many_times, "or more: more than 100 times"),
    "zip.pt": (compressed_torch, "more than 100 times"),
    "lies.safetensors": (safetensors_that_lies, "cannot be read"),
    "header.safetensors": (safetensors_of_a_huge_header, "cannot be read"),
}


SCRIPT = """
import json, resource, sys, torch
from pathlib import Path
from kvscope.trace.importer import import_maps
found = []
for name in sys.argv[1:]:
    said = ""
    try:
        import_maps(Path(name), None, Path(name + ".trace"))
    except Exception as error:
        said = f"{type(error).__name__} {error}"
    found.append([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """In a process of its own: its largest resident memory, after an ordinary file, stays what it is."""
    np.savez(tmp_path / "ordinary.npz", attention=rows_of(0, 1, 4)[None])
    for name, (make, _) in BOMBS.items():
        make(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 2**20
    files = [str(tmp_path / name) for name in ("ordinary.npz", *BOMBS)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)),
    )
    (said, before), *found = json.loads(done.stdout)
    assert said == "" and len(found) == len(BOMBS)
    for (name, (_, message)), (said, most) in zip(BOMBS.items(), found, strict=True):
        assert said.startswith("UsageError") and message in said, (name, said)
        assert most < before + 100_000, f"{name} takes more than 100 MB"
    assert not list(tmp_path.glob("*.*.trace"))[1:], "only the ordinary file gave a trace"


def test_steps_that_would_become_a_square(tmp_path: Path) -> None:
    """Queries without keys take no bytes, and a million of them a square of 10^12."""
    torch.save({"attentions": [[torch.zeros(1, 1, 2**20, 0)], [torch.zeros(1, 1, 1, 2**20)]]}, tmp_path / "maps.pt")
    with pytest.raises(UsageError, match="step 0 has 0 keys, and 1048576 tokens were read"):
        import_maps(tmp_path / "maps.pt", None, tmp_path / "t")


def test_arrays_that_are_not_known_are_not_read(tmp_path: Path) -> None:
    attention = rows_of(0, 1, 4)[None]
    np.savez(tmp_path / "maps.npz", attention=attention, other=np.array([{}], dtype=object))
    assert set(read_captured(tmp_path / "maps.npz")) == {"attention"}
    torch.save({"attentions": torch.from_numpy(attention), "logits": torch.ones(1).expand(2**40)}, tmp_path / "maps.pt")
    assert set(read_captured(tmp_path / "maps.pt")) == {"attentions"}
    np.savez(tmp_path / "maps.npz", weights=attention, logits=attention)
    with pytest.raises(UsageError, match="no array called attention") as caught:
        read_captured(tmp_path / "maps.npz")
    assert caught.value.todo.endswith("the file contains: logits, weights.")


def test_honest_compressed_attention_is_read(tmp_path: Path) -> None:
    """What compresses best of what a model gives: a window of 16 keys of 1024."""
    length = 1024
    inside = np.tri(length, dtype=bool) & ~np.tri(length, k=-16, dtype=bool)
    rows = np.where(inside, np.random.default_rng(0).random((6, 4, length, length), np.float32), 0)
    rows /= rows.sum(-1, keepdims=True)
    np.savez_compressed(tmp_path / "maps.npz", attention=rows)
    assert rows.nbytes > ALWAYS
    assert rows.nbytes / (tmp_path / "maps.npz").stat().st_size < MOST
    assert np.array_equal(read_captured(tmp_path / "maps.npz")["attention"], rows)
