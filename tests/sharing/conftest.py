"""A trace, a replay, and servers on this machine that give their files to others."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests.results.make import make
from tests.trace.make import record

CONNECT, CREATE = socket.socket.connect, socket.create_connection  # before a fixture refuses them
LOCAL = ("127.0.0.1", "localhost", "::1")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of two sequences, ``traces/story``."""
    path = tmp_path / "traces" / "story"
    record(path, lengths=[9, 6])
    return path


@pytest.fixture
def replay(tmp_path: Path) -> Path:
    """A replay of two policies, ``reports/run``."""
    return make(tmp_path / "reports" / "run", [9, 6]).path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that keeps what a test fetches."""
    monkeypatch.setenv("KVSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@dataclass
class Served:
    """A server of the files of a folder.

    Attributes
    ----------
    url : str
        Its address.
    asked : list of str
        The paths that were asked for.
    answers : dict
        Paths at which it answers with this status and header instead of a file; 0 closes the connection halfway.
    """

    url: str
    asked: list[str] = field(default_factory=list)
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)


class Serve(Protocol):
    """Starts a server of a folder."""

    def __call__(self, folder: Path, tls: ssl.SSLContext | None = None) -> Served: ...


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve folders over http; connections to other machines stay refused."""
    _allow_this_machine(monkeypatch)
    running: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path, tls: ssl.SSLContext | None = None) -> Served:
        served = Served("")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(folder, served))
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        served.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
        return served

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def handler(folder: Path, served: Served) -> type[http.server.SimpleHTTPRequestHandler]:
    """Return what answers requests for the files of a folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            served.asked.append(self.path)
            path = self.path.partition("?")[0]
            status, headers = served.answers.get(path, (200, {}))
            if status == 200:
                return super().do_GET()
            self.send_response(status or 200)
            for name, value in headers.items():
                self.send_header(name, value)
            if not status:
                content = (folder / path.lstrip("/")).read_bytes()
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    return Handler


def _allow_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: tuple[str, int]) -> None:
        assert address[0] in LOCAL, f"a test reached for the network: {address}"
        CONNECT(self, address)

    def create(address: tuple[str, int], *rest: object, **named: object) -> socket.socket:
        assert address[0] in LOCAL, f"a test reached for the network: {address}"
        return CREATE(address, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "create_connection", create)
