"""The machine and the library versions that figures were measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it; read when torch is loaded

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what the figures were measured on; for a GPU also its name, memory and driver."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
    found = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | {"device": device_name(device)} | (card(device) if device.startswith("cuda") else {})


def device_name(device: str) -> str:
    """Return the name of a card, or the device itself."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def card(device: str) -> dict[str, Any]:
    """Return the memory of a card, the driver, and the version of CUDA that torch was built for."""
    facts = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"gpu_mib": facts.total_memory // 2**20, "driver": driver, "cuda": torch.version.cuda}
