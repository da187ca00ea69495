"""Traces and replays of other machines: fetched once, anew when they change, and never taken for whole halfway."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from kvscope.core.errors import KvscopeError, ShareError, TraceError
from kvscope.sharing import fetch as fetching
from kvscope.sharing.fetch import fetch, name_of
from kvscope.sharing.kinds import REPLAY, TRACE
from kvscope.sharing.pack import pack
from kvscope.sharing.remote import is_remote, last_part, member, shown
from kvscope.trace.reader import open_trace
from tests.sharing.conftest import Serve, files_of
from tests.trace.make import record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def memory(trace: Path, replay: Path, tmp_path: Path) -> Iterator[str]:
    """The trace, the replay and a packed file of the trace in the memory of fsspec."""
    files = fsspec.filesystem("memory")
    for folder, name in ((trace, "story"), (replay, "run")):
        for path, content in files_of(folder).items():
            files.pipe(f"/shared/{name}/{path}", content)
    files.pipe("/shared/story.kvscope.tar", pack(trace, TRACE, tmp_path / "p.tar").path.read_bytes())
    yield "memory://shared"
    files.rm("/shared", recursive=True)


def leftovers(cache: Path) -> list[str]:
    return [str(path) for path in cache.rglob("*") if path.name.endswith(".incomplete")]


@pytest.mark.parametrize("name", ["story", "story/", "story.kvscope.tar"])
def test_a_trace_is_fetched_once(name: str, memory: str, trace: Path, cache: Path) -> None:
    counted: list[int] = []
    first = fetch(f"{memory}/{name}", TRACE, progress_callback=counted.append)
    assert (first.fresh, first.path.name) == (True, "story")
    assert cache in first.path.parents and files_of(first.path) == files_of(trace)
    assert sum(counted) == sum(len(content) for content in files_of(trace).values()) - len(
        (trace / "trace.json").read_bytes()
    )
    again = fetch(f"{memory}/{name}", TRACE, progress_callback=lambda _: pytest.fail("fetched again"))
    assert (again.fresh, again.path) == (False, first.path)
    assert fetch(f"{memory}/{name}").kind is TRACE
    assert leftovers(cache) == []


def test_a_replay_and_its_summary(memory: str, replay: Path, cache: Path) -> None:
    assert files_of(fetch(f"{memory}/run").path) == files_of(replay)
    assert fetch(f"{memory}/run").kind is REPLAY
    for fresh in (True, False):
        found = fetch(f"{memory}/run/summary.json", REPLAY)
        assert (found.fresh, found.path.name) == (fresh, "summary.json")
        assert found.path.read_bytes() == (replay / "summary.json").read_bytes()
    assert leftovers(cache) == []


@pytest.mark.parametrize("name", ["story", "story.kvscope.tar"])
def test_what_was_changed_is_fetched_anew(name: str, memory: str, trace: Path, tmp_path: Path) -> None:
    old = fetch(f"{memory}/{name}", TRACE)
    record(tmp_path / "other", lengths=[7])
    files = fsspec.filesystem("memory")
    for path, content in files_of(tmp_path / "other").items():
        files.pipe(f"/shared/story/{path}", content)
    files.pipe("/shared/story.kvscope.tar", pack(tmp_path / "other", TRACE, tmp_path / "q.tar").path.read_bytes())
    new = fetch(f"{memory}/{name}", TRACE)
    assert new.fresh and new.path != old.path
    assert open_trace(new.path, verify=True).sequences[0].length == 7
    assert open_trace(old.path, verify=True).sequences[0].length == 9, "who reads the old one is not disturbed"


def test_a_copy_that_lost_a_file_is_fetched_anew(memory: str, trace: Path) -> None:
    first = fetch(f"{memory}/story", TRACE)
    (first.path / "attention" / "layer=000.parquet").unlink()
    again = fetch(f"{memory}/story", TRACE)
    assert again.fresh and files_of(again.path) == files_of(trace)


def test_a_copy_with_a_flipped_bit_is_refused_when_it_is_read(memory: str) -> None:
    file = fetch(f"{memory}/story", TRACE).path / "attention" / "layer=000.parquet"
    content = bytearray(file.read_bytes())
    content[50] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(TraceError, match="checksum differs"):
        open_trace(fetch(f"{memory}/story", TRACE).path).attention(0, 0)


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "missing"])
def test_damaged_files_are_not_kept(damage: str, memory: str, cache: Path) -> None:
    files, name = fsspec.filesystem("memory"), "/shared/story/keys/layer=002.parquet"
    content = files.cat(name)
    changed = {"flipped": content[:-9] + b"?" + content[-8:], "short": content[:-1], "long": content + b"x"}
    files.pipe(name, changed[damage]) if damage in changed else files.rm(name)
    with pytest.raises(ShareError) as caught:
        fetch(f"{memory}/story", TRACE)
    expected = {"flipped": "checksum", "short": "ends after", "long": "has more than", "missing": "there is no"}
    assert expected[damage] in caught.value.what and caught.value.todo
    assert not any(path.is_file() for path in cache.rglob("*")), "nothing is kept"
    files.pipe(name, content)
    assert fetch(f"{memory}/story", TRACE).fresh


def test_what_is_not_there_or_is_something_else(memory: str) -> None:
    for url, kind, what in (
        ("nothing", TRACE, "no trace at memory://shared/nothing: there is no trace.json"),
        ("nothing", REPLAY, "there is no run.json"),
        ("nothing", None, "no trace or replay at"),
        ("nothing.tar", TRACE, "there is no memory://shared/nothing.tar"),
        ("nothing.json", REPLAY, "there is no memory://shared/nothing.json"),
        ("run", TRACE, "there is no trace.json"),
        ("story.kvscope.tar", REPLAY, "has a trace, not a replay"),
    ):
        with pytest.raises(ShareError) as caught:
            fetch(f"{memory}/{url}", kind)
        assert what in caught.value.what and caught.value.todo
    fsspec.filesystem("memory").pipe("/shared/story/trace.json", b"{")
    with pytest.raises(TraceError, match=r"trace memory://shared/story is damaged: trace\.json is not JSON"):
        fetch(f"{memory}/story", TRACE)


def test_a_header_that_names_files_outside(memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trace.json` refuses them already; this is the second check, of what is written to the cache."""
    record = TRACE.parse((fetch(f"{memory}/story").path / "trace.json").read_bytes(), "x")
    record.sizes["../../evil"], record.checksums["../../evil"] = 1, "0" * 64
    with pytest.raises(ShareError, match=r"lists '\.\./\.\./evil', which no trace has"):
        type(TRACE)(**{**vars(TRACE), "parse": lambda *_: record}).files(b"", "x")
    large = json.dumps({"x": "a" * 2000}).encode()
    fsspec.filesystem("memory").pipe("/shared/story/trace.json", large)
    monkeypatch.setattr(fetching, "HEADER_BYTES", 1000)
    with pytest.raises(ShareError, match="is larger than 1000 bytes"):
        fetch(f"{memory}/story", TRACE)


def test_files_of_this_machine(trace: Path) -> None:
    assert files_of(fetch(f"file://{trace}", TRACE).path) == files_of(trace)


@pytest.mark.parametrize("scheme", ["s3", "hf"])
def test_the_registry_of_fsspec_decides(
    scheme: str, trace: Path, replay: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file system that is registered under the name gets the paths as the real one would."""
    asked: list[str] = []

    class Fake(LocalFileSystem):  # type: ignore[misc]
        protocol = scheme
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix(f"{scheme}://")

        def _open(self, path: str, mode: str = "rb", **rest: object) -> object:
            asked.append(path)
            if "private" in path:
                raise PermissionError("Access Denied")
            if "broken" in path:
                raise type("NoCredentialsError", (Exception,), {})("Unable to locate credentials")
            return super()._open(str(tmp_path / path.removeprefix("datasets/")), mode, **rest)

    fsspec.register_implementation(scheme, Fake, clobber=True)
    try:
        assert files_of(fetch(f"{scheme}://datasets/traces/story").path) == files_of(trace)
        assert files_of(fetch(f"{scheme}://datasets/reports/run", REPLAY).path) == files_of(replay)
        assert asked[0] == "datasets/traces/story/trace.json"
        for place, what in (("private", "may not be read: Access Denied"), ("broken", "Unable to locate credentials")):
            with pytest.raises(ShareError, match=what) as caught:
                fetch(f"{scheme}://{place}/x", TRACE)
            assert {"s3": "AWS_PROFILE", "hf": "HF_TOKEN"}[scheme] in caught.value.todo
    finally:
        _registry.pop(scheme)


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # importing it raises ImportError, installed or not
    with pytest.raises(ShareError, match=r"s3:// needs a package that is not installed") as caught:
        fetch("s3://bucket/story", TRACE)
    assert caught.value.todo == "Install it: pip install s3fs"
    with pytest.raises(ShareError, match="unknown protocol, nosuch"):
        fetch("nosuch://bucket/story", TRACE)


def test_a_folder_and_a_packed_file_over_http(trace: Path, tmp_path: Path, serve: Serve) -> None:
    pack(trace, TRACE, tmp_path / "traces" / "p.kvscope.tar")
    web = serve(tmp_path)
    assert files_of(fetch(f"{web.url}/traces/story", TRACE).path) == files_of(trace)
    assert web.asked[0] == "/traces/story/trace.json" and len(web.asked) == len(files_of(trace))
    web.asked.clear()
    assert not fetch(f"{web.url}/traces/story", TRACE).fresh
    assert web.asked == ["/traces/story/trace.json"]
    found = fetch(f"{web.url}/traces/p.kvscope.tar?download=true&sig=secret", TRACE)
    assert (found.path.name, files_of(found.path)) == ("p", files_of(trace))
    assert fetch(f"{web.url}/traces/story/?token=secret").fresh, "another address is another copy"
    assert web.asked[-1].endswith("?token=secret")


@pytest.mark.parametrize(
    ("status", "what", "todo"),
    [
        (404, "no trace at", "Name a folder"),
        (403, "may not be read", "access"),
        (401, "may not be read", "access"),
        (500, "cannot be read: HTTP Error 500", "network"),
        (302, "leads to ftp://example.com", "https"),
    ],
)
def test_answers_that_are_not_the_file(
    status: int, what: str, todo: str, trace: Path, tmp_path: Path, serve: Serve, cache: Path
) -> None:
    web = serve(tmp_path)
    web.answers["/traces/story/trace.json"] = (status, {"Location": "ftp://example.com/x"})
    with pytest.raises(ShareError) as caught:
        fetch(f"{web.url}/traces/story?sig=secret", TRACE)
    assert what in caught.value.what and todo in caught.value.todo
    assert "secret" not in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["story", "p.tar"])
def test_a_connection_that_breaks_off(name: str, trace: Path, tmp_path: Path, serve: Serve, cache: Path) -> None:
    pack(trace, TRACE, tmp_path / "traces" / "p.tar")
    web = serve(tmp_path / "traces")
    broken = "/p.tar" if name == "p.tar" else "/story/attention/layer=002.parquet"
    web.answers[broken] = (0, {})
    with pytest.raises(ShareError) as caught:
        fetch(f"{web.url}/{name}", TRACE)
    assert "ends" in caught.value.what or "cut off" in caught.value.what
    assert not any(path.is_file() for path in cache.rglob("*"))
    del web.answers[broken]
    assert files_of(fetch(f"{web.url}/{name}", TRACE).path) == files_of(trace)


def test_without_a_network_the_kept_copy_is_named(trace: Path, tmp_path: Path, serve: Serve) -> None:
    web = serve(tmp_path)
    kept = fetch(f"{web.url}/traces/story", TRACE).path
    web.answers["/traces/story/trace.json"] = (503, {})
    with pytest.raises(ShareError) as caught:
        fetch(f"{web.url}/traces/story", TRACE)
    assert caught.value.todo == f"Check the address and the network. A copy from before is in {kept}"
    with pytest.raises(ShareError, match=r"cannot be read: .*refused"):
        fetch("http://127.0.0.1:9/story", TRACE)
    for address in ("http://", "http://[", "https:///x", "http://127.0.0.1:port/x", "http://127.0.0.1:9/a b\n"):
        with pytest.raises(ShareError) as caught:
            fetch(address, TRACE)
        assert caught.value.todo


def test_over_tls(trace: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate of the server, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    subprocess.run(
        [openssl, *request.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    web = serve(tmp_path, tls=context)
    with pytest.raises(ShareError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(f"{web.url}/traces/story", TRACE)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert web.url.startswith("https://")
    assert files_of(fetch(f"{web.url}/traces/story", TRACE).path) == files_of(trace)
    web.answers["/traces/other/trace.json"] = (302, {"Location": "http://127.0.0.1/x"})
    with pytest.raises(ShareError, match="leads to http://127"):
        fetch(f"{web.url}/traces/other", TRACE)


def test_two_processes_fetch_at_once(trace: Path, tmp_path: Path, serve: Serve, cache: Path) -> None:
    """Each starts before either has finished: both get a whole copy, and one is kept."""
    pack(trace, TRACE, tmp_path / "traces" / "p.tar")
    web = serve(tmp_path)
    script = (
        "import sys, time; from pathlib import Path; from kvscope.sharing import fetch, kinds\n"
        "def slow(count):\n"
        "    Path(sys.argv[2]).touch()\n"
        "    while not Path(sys.argv[3]).exists(): time.sleep(0.01)\n"
        "print(fetch.fetch(sys.argv[1], kinds.TRACE, progress_callback=slow).path)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("story", "p.tar"):
        marks = [str(tmp_path / f"{name}-{number}") for number in (1, 2)]
        running = [
            subprocess.Popen(
                [sys.executable, "-c", script, f"{web.url}/traces/{name}", own, other],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for own, other in (marks, marks[::-1])
        ]
        paths = {process.communicate(timeout=60)[0].strip() for process in running}
        assert [process.returncode for process in running] == [0, 0]
        assert len(paths) == 1 and files_of(Path(paths.pop())) == files_of(trace)
    assert leftovers(cache) == []


def test_threads_fetch_at_once(trace: Path, cache: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(f"file://{trace}").path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 8 and len(set(paths)) == 1 and files_of(paths[0]) == files_of(trace)
    assert leftovers(cache) == []


def test_killed_while_it_fetches(trace: Path, cache: Path) -> None:
    script = (
        "import os, sys; from kvscope.sharing.fetch import fetch\n"
        "fetch(sys.argv[1], progress_callback=lambda count: os.kill(os.getpid(), 9))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, f"file://{trace}"], env=environment)
    assert done.returncode == -9 and len(leftovers(cache)) == 1
    found = fetch(f"file://{trace}")
    assert found.fresh and files_of(found.path) == files_of(trace)
    assert leftovers(cache) == [], "what the dead process left is removed"


def test_a_cache_that_cannot_be_written(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder, what in ((tmp_path / "file" / "x", "Not a directory"), (Path("/proc/none"), "No such file")):
        monkeypatch.setenv("KVSCOPE_CACHE", str(folder))
        with pytest.raises(ShareError, match=what) as caught:
            fetch(f"file://{trace}")
        assert "KVSCOPE_CACHE" in caught.value.todo
    monkeypatch.setenv("KVSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))  # type: ignore[attr-defined]
    with pytest.raises(ShareError, match="10 bytes free") as caught:
        fetch(f"file://{trace}")
    assert "KVSCOPE_CACHE" in caught.value.todo


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvscope.sharing.cache import cache_folder

    monkeypatch.delenv("KVSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "kvscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kvscope"

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(KvscopeError, match="no home folder"):
        cache_folder()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/a/story", "story"),
        ("hf://datasets/me/set/story.kvscope.tar", "story"),
        ("https://h/a/story.tar?x=/y", "story"),
        ("https://h", "unnamed"),
        ("https://h/..", "unnamed"),
        ("https://h/%2e%2e%2fevil/", "evil"),
        ("memory://a/b;c d", "b-c-d"),
        ("https://h/" + "x" * 300, "x" * 80),
    ],
)
def test_names_of_copies(url: str, name: str) -> None:
    assert name_of(url) == name


def test_addresses() -> None:
    assert is_remote("s3://a") and is_remote("HTTPS://a") and is_remote("hf://datasets/a")
    assert not any(map(is_remote, ["traces/a", "a", "C:\\a", "/a://b", "./s3://a", "c://a"]))
    assert last_part("https://h/a%20b/c%3D/?q=/x") == "c="
    assert member("https://h/a/?q=1", "attention/layer=003.parquet") == "https://h/a/attention/layer=003.parquet?q=1"
    assert member("s3://b/a/", "x") == "s3://b/a/x"
    assert shown("https://me:pw@h/a?sig=1#x") == "https://h/a"
    assert shown("sftp://me:pw@h/a") == "sftp://h/a"
    assert shown("hf://datasets/me/set@main/x") == "hf://datasets/me/set@main/x"
