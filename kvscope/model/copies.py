"""Copies of tensors on the host, which are made while the device computes.

`HostCopies.start` does not wait for the device: it puts the copies on a stream of their own, into pinned memory.
Whoever needs the numbers calls `Copy.wait`, usually in another thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvscope.trace.blocks import Array


class Event(Protocol):
    """Something on a device that will have happened, such as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Block until it has happened."""


@dataclass(frozen=True)
class Copy:
    """Copies on the host that may still be under way.

    Attributes
    ----------
    host : dict of str to Tensor
        The copies, by name; not complete before `wait` returns.
    made : Event or None
        What to wait for; None if they are complete.
    """

    host: dict[str, Tensor]
    made: Event | None = None

    def wait(self) -> dict[str, Array]:
        """Return the copies as arrays when they are complete."""
        if self.made is not None:
            self.made.synchronize()
        return {name: tensor.numpy() for name, tensor in self.host.items()}


class HostCopies:
    """Starts copies to the host: at once for tensors that are there, on a side stream for those of a CUDA device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, tensors: Mapping[str, Tensor]) -> Copy:
        """Start copies of tensors of one device, which must not be modified afterwards."""
        device = next(iter(tensors.values())).device
        if device.type == "cpu":
            return Copy(dict(tensors))
        if device.type != "cuda":
            return Copy({name: tensor.cpu() for name, tensor in tensors.items()})
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        host = {}
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                host[name] = torch.empty_like(tensor, device="cpu", pin_memory=True)  # with its strides
                host[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)  # its memory must not be reused before it is copied
        made = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        return Copy(host, stream.record_event(made))
