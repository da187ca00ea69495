"""Names that a shell completes: policies and metrics from the source, traces and replays from their folders.

Importing the classes of policies would load torch, for seconds at every press of the tab key. The names are therefore
read from the lines that register them. Those of other packages are not completed.
"""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def policy_names(incomplete: str) -> list[str]:
    """Return the policies whose names begin with `incomplete`, and ``all``."""
    return _starting([*_registered("policy", "policies"), "all"], incomplete)


def metric_names(incomplete: str) -> list[str]:
    """Return the metrics whose names begin with `incomplete`."""
    return _starting(_registered("metric", "metrics"), incomplete)


def trace_names(incomplete: str) -> list[str]:
    """Return the complete traces under ``traces/`` whose names begin with `incomplete`."""
    return _starting(_complete("TRACES"), incomplete)


def replay_names(incomplete: str) -> list[str]:
    """Return the complete replays under ``reports/`` whose names begin with `incomplete`."""
    return _starting(_complete("REPORTS"), incomplete)


def either_names(incomplete: str) -> list[str]:
    """Return the complete traces and replays whose names begin with `incomplete`."""
    return _starting([*_complete("TRACES"), *_complete("REPORTS")], incomplete)


def _registered(kind: str, room: str) -> list[str]:
    """Return the names that ``@policy("name")`` and the like register in the files of a room."""
    line = re.compile(rf'^@{kind}\(\s*"([^"]+)"', re.MULTILINE)
    return [name for path in (PACKAGE / room).glob("*.py") for name in line.findall(path.read_text("utf-8"))]


def _complete(name: str) -> list[str]:
    """Return what is complete in the folder that `kvscope.cli.places` calls so."""
    from kvscope.cli import places  # here, since every command imports this module

    folder: Path = getattr(places, name)
    return [path.parent.name for path in folder.glob(f"*/{places.HEADER[folder]}")]


def _starting(names: list[str], start: str) -> list[str]:
    return sorted({name for name in names if name.startswith(start)})
