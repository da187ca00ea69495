"""The device to compute on."""

from __future__ import annotations

import torch

from kvscope.core.errors import UsageError

AUTO = "auto"


def torch_device(name: str, *, double: bool = True) -> torch.device:
    """Return the device called `name`; ``auto`` is CUDA, then MPS, then the CPU.

    Parameters
    ----------
    name : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    double : bool
        Whether numbers in double are needed, which MPS does not have: ``auto`` then skips it.

    Raises
    ------
    UsageError
        If the device cannot be used.
    """
    if name == AUTO:
        return torch.device(_best(double))
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float64 if double else torch.float32)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device {name!r} cannot be used: {error}".splitlines()[0], "Use --device cpu.") from error
    return device


def on_cpu(device: torch.device) -> bool:
    """Return whether NumPy and compiled loops can process tensors of a device; other devices must not be waited for."""
    return device.type == "cpu"


def thread_count() -> int:
    """Return how many threads a CPU computes with."""
    return torch.get_num_threads()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of a CPU on a device, without waiting for the copy where its memory is pinned: `staging`."""
    return tensor.to(device, non_blocking=True)


def staging(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU to fill and copy to `device`; pinned where that is CUDA."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _best(double: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and not double else "cpu"
