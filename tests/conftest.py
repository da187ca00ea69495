"""What holds for every test: offline, one thread, and a GPU only where there is one."""

import os

# Before anything imports transformers or torch: these are read at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import socket
from collections.abc import Iterator

import pytest
import torch

from tests.own_code import forget_members, forget_modules

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which `import torch` alone does not do


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; commands would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object, **_: object) -> None:
        raise AssertionError(f"a test reached for the network: {address}")

    connect = socket.socket.connect

    def within_the_machine(self: socket.socket, address: str) -> None:
        if self.family != getattr(socket, "AF_UNIX", None):  # of a process that wandb starts
            refuse(address)
        connect(self, address)

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", within_the_machine)


@pytest.fixture(autouse=True)
def _no_code_of_users() -> Iterator[None]:
    """Forget policies and metrics that a test took from a file: the lists of the next test do not name them."""
    yield
    if forget_modules():
        forget_members()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
