"""One file for a trace or a replay: the same bytes each time, and no changed byte is taken for whole."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.core.errors import KvscopeError, OutputExists, ResultError, ShareError, TraceError
from kvscope.core.seal import sealed
from kvscope.results.store import open_replay
from kvscope.sharing import copying
from kvscope.sharing.archive import END, LIST, PackRecord, list_bytes, padding, tar_header
from kvscope.sharing.kinds import KINDS, REPLAY, TRACE, Kind, SharedFile
from kvscope.sharing.pack import pack
from kvscope.sharing.unpack import PackedFile, unpack
from kvscope.trace.reader import open_trace
from tests.sharing.conftest import files_of
from tests.trace.make import change_header, record

ROOT = Path(__file__).parents[2]


def unpacked(file: Path, output: Path, **options: bool) -> Path:
    with file.open("rb") as stream:
        return unpack(PackedFile(stream, file.name), output, **options)


@pytest.fixture
def packed(trace: Path, tmp_path: Path) -> Path:
    return pack(trace, TRACE, tmp_path / "story.kvscope.tar").path


def test_a_trace_and_a_replay_come_back_as_they_were(trace: Path, replay: Path, tmp_path: Path) -> None:
    for folder, kind in ((trace, TRACE), (replay, REPLAY)):
        (folder / "notes.txt").write_text("not part of it")
        made = pack(folder, kind, tmp_path / f"{kind.noun}.tar")
        assert made.sha256 == hashlib.sha256(made.path.read_bytes()).hexdigest()
        assert made.bytes == made.path.stat().st_size
        (folder / "notes.txt").unlink()
        back = unpacked(made.path, tmp_path / "back" / kind.noun)
        assert files_of(back) == files_of(folder)
        assert kind.open(back) is not None
    assert sorted(item.name for item in (tmp_path / "back").iterdir()) == ["replay", "trace"]


def test_packing_twice_gives_the_same_file(trace: Path, tmp_path: Path) -> None:
    first = pack(trace, TRACE, tmp_path / "a.tar").path.read_bytes()
    other = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(trace, other)
    for file in other.rglob("*"):
        os.utime(file, (1, 1))
        file.chmod(0o700)
    assert pack(other, TRACE, tmp_path / "b.tar").path.read_bytes() == first
    again = pack(unpacked(tmp_path / "a.tar", tmp_path / "c"), TRACE, tmp_path / "c.tar").path
    assert again.read_bytes() == first


def test_any_tar_reads_it(packed: Path, trace: Path, tmp_path: Path) -> None:
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "plain", filter="data")
        assert all(member.isfile() and member.mtime == 0 and member.uid == 0 for member in archive)
        assert [member.name for member in archive][:2] == [LIST, "trace.json"]
    (tmp_path / "plain" / LIST).unlink()
    assert files_of(tmp_path / "plain") == files_of(trace)
    large = tarfile.TarInfo.frombuf(tar_header("attention/layer=000.parquet", 2**40), "utf-8", "strict")
    assert (large.name, large.size) == ("attention/layer=000.parquet", 2**40)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[3], stored=["maps"])
    content = bytearray(pack(tmp_path / "t", TRACE, tmp_path / "t.tar").path.read_bytes())
    places = {*range(0, 4096, 5), *range(0, len(content), 61), *range(len(content) - 1030, len(content), 7)}
    for place in sorted(places):
        content[place] ^= 1 << place % 8
        with pytest.raises(KvscopeError) as caught:
            unpack(PackedFile(io.BytesIO(bytes(content)), "t.tar"), tmp_path / "out")
        assert caught.value.todo, place
        assert not list(tmp_path.glob("out*")), place
        content[place] ^= 1 << place % 8
    unpack(PackedFile(io.BytesIO(bytes(content)), "t.tar"), tmp_path / "out")


def test_every_length_is_refused(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    for length in (0, 1, 511, 512, 513, 2000, *range(0, len(content), 777), len(content) - 512, len(content) - 1):
        with pytest.raises(ShareError):
            unpack(PackedFile(io.BytesIO(content[:length]), "t.tar"), tmp_path / "out")
    for more in (b"\0", bytes(512), content):
        with pytest.raises(ShareError, match="goes on after its end"):
            unpack(PackedFile(io.BytesIO(content + more), "t.tar"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def archive(files: list[tuple[str, bytes]], kind: Kind = TRACE) -> bytes:
    """Return a packed file of any content, with the list and checksums that fit, as an attacker would make it."""
    listed = [SharedFile(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in files]
    return raw(PackRecord(kind.noun, tuple(listed)), files)


def raw(record: PackRecord, files: list[tuple[str, bytes]]) -> bytes:
    parts = []
    for name, content in [(LIST, list_bytes(record)), *files]:
        parts += [tar_header(name, len(content)), content, padding(len(content))]
    return b"".join(parts) + END


def content_of(folder: Path, kind: Kind = TRACE) -> list[tuple[str, bytes]]:
    found = files_of(folder)
    return [(kind.header, found.pop(kind.header)), *sorted(found.items())]


def refused(content: bytes, tmp_path: Path) -> str:
    with pytest.raises(ShareError) as caught:
        unpack(PackedFile(io.BytesIO(content), "bad.tar"), tmp_path / "in" / "out")
    assert not (tmp_path / "in").exists() or not list((tmp_path / "in").iterdir())
    assert caught.value.todo
    return caught.value.what


def test_the_forger_can_make_a_good_one(trace: Path, packed: Path) -> None:
    assert archive(content_of(trace)) == packed.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "attention/../../evil",
        "attention/layer=000.parquet/../x",
        "evil.py",
        "sub/trace.json",
        "attention\\layer=000.parquet",
        "C:evil",
        "kvscope-pack.json",
        "./tokens.parquet",
        "attention//layer=000.parquet",
        "tokens.parquet\n",
        "attention/layer=０.parquet",
    ],
)
def test_names_that_no_trace_has(name: str, trace: Path, tmp_path: Path) -> None:
    files = content_of(trace)
    text = archive([files[0], *sorted([*files[1:], ("zzz", b"x")])])
    renamed = json.loads(text[512 : text.index(b"\0", 512)].decode())
    for each in renamed["files"]:
        each["name"] = name if each["name"] == "zzz" else each["name"]
    body = (json.dumps(sealed(renamed), indent=1) + "\n").encode()
    whole = tar_header(LIST, len(body)) + body + padding(len(body))
    assert "bad.tar" in refused(whole + END, tmp_path)
    assert not (tmp_path / "evil").exists()


def test_files_that_are_unexpected_missing_or_twice(trace: Path, tmp_path: Path) -> None:
    files = content_of(trace)
    more = ("attention/layer=001.parquet", b"x")
    assert "its list is not that of trace.json" in refused(archive([files[0], *sorted([*files[1:], more])]), tmp_path)
    assert "its list is not that of trace.json" in refused(archive(files[:-1]), tmp_path)
    assert "twice" in refused(archive([*files, files[-1]]), tmp_path)
    assert "not in order" in refused(archive([files[0], *reversed(files[1:])]), tmp_path)
    assert "does not begin with trace.json" in refused(archive(files[1:]), tmp_path)
    assert "does not begin with run.json" in refused(archive(files, REPLAY), tmp_path)
    good = archive(files)
    last = files[-1]
    entry = tar_header(last[0], len(last[1])) + last[1] + padding(len(last[1]))
    assert "does not end with zero bytes" in refused(good[: -len(END)] + entry + END, tmp_path)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"1", "a link"),
        (b"2", "a link"),
        (b"3", "a device"),
        (b"4", "a device"),
        (b"5", "a folder"),
        (b"6", "a FIFO"),
        (b"x", "field"),
        (b"S", "field"),
    ],
)
def test_what_is_no_plain_file(kind: bytes, what: str, trace: Path, tmp_path: Path) -> None:
    content = bytearray(archive(content_of(trace)))
    at = content.index(b"attention/layer=000.parquet\0")
    content[at + 156 : at + 157] = kind
    content[at + 157 : at + 168] = b"/etc/passwd"
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = f"{sum(content[at : at + 512]):06o}\0 ".encode()
    assert what in refused(bytes(content), tmp_path)


def test_sizes_that_lie(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = content_of(trace)
    name, content = files[1]
    good = archive(files)
    for size in (len(content) - 1, len(content) + 1, 2**40):
        wrong = good.replace(tar_header(name, len(content)), tar_header(name, size))
        assert f"size, or another field, of {name}" in refused(wrong, tmp_path)
    huge = json.loads(files[0][1])
    huge["sizes"] = dict.fromkeys(huge["sizes"], 2**50)
    header = (json.dumps(sealed(huge), indent=1)).encode()
    listed = [SharedFile(files[0][0], len(header), hashlib.sha256(header).hexdigest())]
    listed += [SharedFile(each, 2**50, huge["checksums"][each]) for each, _ in files[1:]]
    started = time.monotonic()
    assert "are needed, and the disk" in refused(
        raw(PackRecord("trace", tuple(listed)), [("trace.json", header)]), tmp_path
    )
    first = tar_header(LIST, 2**32)
    assert "its list has 4294967296 bytes: too many" in refused(first + bytes(600), tmp_path)
    listed[0] = replace(listed[0], bytes=2**40)
    assert "too many" in refused(raw(PackRecord("trace", tuple(listed)), []), tmp_path)
    assert time.monotonic() - started < 5


def test_a_list_that_was_changed(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    text = content[512 : content.index(b"\0", 512)]
    data = json.loads(text)

    def with_list(body: bytes) -> bytes:
        rest = content[512 + len(text) + len(padding(len(text))) :]
        return tar_header(LIST, len(body)) + body + padding(len(body)) + rest

    assert "its checksum differs" in refused(with_list(text.replace(b'"trace"', b'"replay"')), tmp_path)
    assert "newer than this kvscope" in refused(with_list(json.dumps(sealed({**data, "schema": 9})).encode()), tmp_path)
    assert "was changed since" in refused(with_list(json.dumps(sealed(data)).encode()), tmp_path)
    assert "not a kvscope packed file" in refused(with_list(b"[]"), tmp_path)
    assert "not JSON" in refused(with_list(b"[" * 100_000), tmp_path)
    for foreign in (b"", b"PK\x03\x04" + bytes(600), b"\x80\x04\x95" + bytes(600), tar_header("a", 0) + END):
        assert "is not a packed file" in refused(foreign, tmp_path)


def test_a_damaged_trace_is_not_packed(trace: Path, tmp_path: Path) -> None:
    file = trace / "attention" / "layer=000.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(TraceError, match="checksum differs"):
        pack(trace, TRACE, tmp_path / "out.tar")
    file.unlink()
    with pytest.raises(TraceError, match="is missing"):
        pack(trace, TRACE, tmp_path / "out.tar")
    file.symlink_to("/etc/hostname")
    with pytest.raises(TraceError, match="is damaged"):
        pack(trace, TRACE, tmp_path / "out.tar")
    assert not list(tmp_path.glob("out*"))


def test_what_is_packed_of_a_damaged_trace_is_refused(trace: Path, tmp_path: Path) -> None:
    """Its checksums fit, because they were made after the damage; that it is no trace is seen when it is opened."""
    files = content_of(trace)
    data = json.loads(files[0][1])
    files[-1] = ("tokens.parquet", b"PAR1" + bytes(100))
    data["sizes"]["tokens.parquet"] = 104
    data["checksums"]["tokens.parquet"] = hashlib.sha256(files[-1][1]).hexdigest()
    files[0] = ("trace.json", json.dumps(sealed(data)).encode())
    assert "has a damaged trace" in refused(archive(files), tmp_path)


def test_a_header_of_an_older_version_and_a_newer_one(trace: Path, tmp_path: Path) -> None:
    change_header(trace, {}, version=5)
    made = pack(trace, TRACE, tmp_path / "old.tar")
    assert open_trace(unpacked(made.path, tmp_path / "old"), verify=True).record.schema == 5
    files = content_of(trace)
    files[0] = ("trace.json", files[0][1].replace(b'"schema": 5', b'"schema": 99'))
    with pytest.raises(TraceError, match="newer than this kvscope"):
        unpack(PackedFile(io.BytesIO(archive(files)), "x.tar"), tmp_path / "new")


def test_outputs_that_exist(packed: Path, trace: Path, replay: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        pack(trace, TRACE, packed)
    before = packed.read_bytes()
    assert pack(trace, TRACE, packed, force=True).path.read_bytes() == before
    with pytest.raises(OutputExists):
        unpacked(packed, trace)
    (trace / "tokens.parquet").write_bytes(b"damaged")
    assert open_trace(unpacked(packed, trace, force=True), verify=True)
    with pytest.raises(TraceError, match="which no trace has: it is not replaced"):
        unpacked(packed, replay, force=True)
    assert open_replay(replay, verify=True)
    whole = files_of(trace)
    packed.write_bytes(before[:-700])
    with pytest.raises(ShareError):
        unpacked(packed, trace, force=True)
    assert files_of(trace) == whole, "an older trace is kept where the new one is damaged"


def test_a_full_disk_leaves_nothing(packed: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write fails in turn, as where the disk is full."""

    def failing(after: int) -> None:
        written, write = [0], open_file

        def limited(self: Path, mode: str = "r", **rest: object) -> io.IOBase:
            file = write(self, mode, **rest)
            if "x" not in mode:
                return file
            true = file.write

            class Full:
                def __enter__(self) -> Full:
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def write(self, data: bytes) -> int:
                    written[0] += len(data)
                    if written[0] > after:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return true(data)

            return Full()  # type: ignore[return-value]

        monkeypatch.setattr(Path, "open", limited)

    open_file = Path.open
    for after in (0, 600, 5000, 20_000):
        failing(after)
        with pytest.raises(OSError, match="No space"):
            pack(trace, TRACE, tmp_path / "new.tar")
        if after < 20_000:
            with pytest.raises(TraceError, match=r"the disk of .* is full"):
                unpacked(packed, tmp_path / "new")
        monkeypatch.setattr(Path, "open", open_file)
        assert not list(tmp_path.glob("new*")), after
    monkeypatch.setattr(copying.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(ShareError, match="10 bytes free"):
        unpacked(packed, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_killed_while_it_writes(command: str, packed: Path, trace: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from kvscope.sharing import kinds, pack, unpack\n"
        "count = [0]\n"
        "def dies(done):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3: os.kill(os.getpid(), 9)\n"
        f"if {command!r} == 'pack': pack.pack(Path({str(trace)!r}), kinds.TRACE, Path('new'), progress_callback=dies)\n"
        f"with open({str(packed)!r}, 'rb') as stream:\n"
        "    unpack.unpack(unpack.PackedFile(stream, 'p'), Path('new'), progress_callback=dies)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "work").mkdir()
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "work", env=environment)
    assert done.returncode == -signal.SIGKILL
    left = list((tmp_path / "work").iterdir())
    assert len(left) == 1 and left[0].name.endswith(".incomplete"), left
    new = tmp_path / "work" / "new"
    with pytest.raises(TraceError, match="incomplete"):
        open_trace(left[0])
    if command == "pack":
        pack(trace, TRACE, new)
    else:
        unpacked(packed, new)
    assert [item.name for item in (tmp_path / "work").iterdir()] == ["new"], "leftovers of a dead process are removed"


def test_interrupted_while_it_writes(packed: Path, trace: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(trace, TRACE, tmp_path / "new.tar", progress_callback=stop)
    with packed.open("rb") as stream, pytest.raises(KeyboardInterrupt):
        unpack(PackedFile(stream, "p"), tmp_path / "new", progress_callback=stop)
    assert not list(tmp_path.glob("new*"))


def test_two_processes_unpack_into_one_folder(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "new.incomplete").mkdir()
    writer = {"pid": os.getppid(), "host": __import__("socket").gethostname()}
    (tmp_path / "new.incomplete" / "trace.json").write_text(json.dumps({"writer": writer}))
    with pytest.raises(TraceError, match="is writing"):
        unpacked(packed, tmp_path / "new")


def test_both_kinds_are_known() -> None:
    assert KINDS == {"trace": TRACE, "replay": REPLAY}
    assert (TRACE.error, REPLAY.error) == (TraceError, ResultError)
