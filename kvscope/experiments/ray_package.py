"""The package ray, which only experiments on a cluster need. This module loads no other: it can be called first."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from kvscope.core.errors import UsageError


def load_ray() -> ModuleType:
    """Return the package ray.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    try:
        return import_module("ray")
    except ImportError as error:
        raise UsageError(
            f"an experiment on Ray needs the package {error.name}", "Install it: pip install 'kvscope[ray]'"
        ) from error
