"""Copies from a CUDA device are made on a stream of their own, into pinned memory, and nothing waits but `Copy.wait`.

The device is a fake that writes down what is asked of it; tests marked `gpu` use a real one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.model.copies import HostCopies

CUDA = torch.device("cuda:1")


class FakeDevice:
    """Stands for `torch.cuda`: streams, events and tensors whose calls are written down in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.current = "the model's stream"
        for name, fake in (
            ("Stream", lambda device: FakeStream(self, device)),
            ("current_stream", lambda device: "the model's stream"),
            ("stream", self.on),
            ("Event", lambda blocking: FakeEvent(self, blocking)),
        ):
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch, "empty_like", self.empty_like)

    @contextmanager
    def on(self, stream: "FakeStream") -> Iterator[None]:
        self.current = "side"
        yield
        self.current = "the model's stream"

    def empty_like(self, tensor: "FakeTensor", *, device: str, pin_memory: bool) -> "FakeHost":
        assert (device, pin_memory) == ("cpu", True)
        return FakeHost(self)


class FakeStream:
    def __init__(self, device: FakeDevice, of: torch.device) -> None:
        self.device = device
        device.calls.append(("new stream", of))

    def wait_stream(self, other: str) -> None:
        self.device.calls.append(("waits for", other))

    def record_event(self, event: "FakeEvent") -> "FakeEvent":
        self.device.calls.append(("recorded",))
        return event


class FakeEvent:
    def __init__(self, device: FakeDevice, blocking: bool) -> None:
        self.device = device
        assert blocking, "a thread that waits must not spin: the model needs the core"

    def synchronize(self) -> None:
        self.device.calls.append(("synchronized",))


class FakeTensor:
    device = CUDA

    def __init__(self, calls: FakeDevice) -> None:
        self.calls = calls

    def record_stream(self, stream: FakeStream) -> None:
        self.calls.calls.append(("kept for", type(stream).__name__))


class FakeHost:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def copy_(self, tensor: FakeTensor, *, non_blocking: bool) -> None:
        assert non_blocking
        self.device.calls.append(("copied on", self.device.current))

    def numpy(self) -> np.ndarray:
        return np.zeros(1)


def test_a_side_stream_copies_after_what_made_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        device, copies = FakeDevice(patch), HostCopies()
        of_two: Any = {"a": FakeTensor(device), "b": FakeTensor(device)}
        first = copies.start(of_two)
        each = [("copied on", "side"), ("kept for", "FakeStream")]
        own = [("waits for", "the model's stream"), *each, *each, ("recorded",)]
        assert device.calls == [("new stream", CUDA), *own]
        copies.start(of_two)
        assert device.calls == [("new stream", CUDA), *own, *own], "one stream for all copies of a device"
        assert list(first.wait()) == ["a", "b"]
        assert device.calls[-1] == ("synchronized",)


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    tensor = torch.arange(3)
    copy = HostCopies().start({"a": tensor})
    assert copy.made is None
    assert copy.wait()["a"].tolist() == [0, 1, 2]
