"""What this machine computes with: versions, devices, and the kernels in use."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec

import torch

from kvscope.core.version import versions
from kvscope.kernels import OFF, available, triton_available
from kvscope.kernels.device import torch_device

LIBRARIES = ("torch", "transformers", "numpy", "pyarrow", "numba", "triton")


def system() -> dict[str, str]:
    """Return versions, devices and kernels, each as one line."""
    installed = versions(*(name for name in LIBRARIES if find_spec(name)))
    missing = [name for name in LIBRARIES if name not in installed]
    return {
        "python": platform.python_version(),
        **installed,
        **dict.fromkeys(missing, "not installed"),
        "devices": ", ".join(_devices()),
        "device auto": str(torch_device("auto")),
        "threads": str(torch.get_num_threads()),
        "kernels on the CPU": "numba" if available() else f"none, torch is used: {_why('numba')}",
        "kernels on a GPU": _gpu_kernels(),
    }


def _devices() -> list[str]:
    found = [f"cuda:{n} ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, f"cpu ({os.cpu_count()} cores)"]


def _gpu_kernels() -> str:
    if not torch.cuda.is_available():
        return "none: there is no CUDA device"
    return "Triton" if triton_available() else f"none, torch is used: {_why('triton')}"


def _why(library: str) -> str:
    return f"{OFF} is set" if os.environ.get(OFF) else f"{library} is not installed"
