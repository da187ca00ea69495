"""What holds for every test: offline, one thread, and a GPU only where there is one."""

import importlib.util
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
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    """Let Triton's interpreter replace the functions of its language once a launch, not at every call of a function.

    A function that a kernel calls finds them replaced, and searching all of them again takes a third of the time.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    language = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch, modules = interpreter._patch_lang, (language, language.core)

    def once(function: Any) -> Any:
        used = [value for value in function.__globals__.values() if any(value is module for module in modules)]
        return patch(function) if any(language.core.is_builtin(module.load) for module in used) else None

    interpreter._patch_lang = once


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
