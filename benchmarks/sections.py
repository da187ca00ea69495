"""A measurement in sections under a limit on time: every section's figures are saved before the next one begins."""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GROWTH = 1.5  # the time of a section grows with this power of the tokens: between linear and quadratic


@dataclass(frozen=True)
class Section:
    """One part of a measurement.

    Attributes
    ----------
    name : str
        What is measured.
    shape : str
        Shape of the model; sections of one shape share an equal part of the time.
    tokens : int or None
        Length of the text, where the section has one.
    seconds : float
        How long it takes if no shorter section of the same name and shape has been measured.
    measure : callable
        Takes the seconds that it may use, and returns figures. ``rounds`` among them says how often it has measured,
        after one warm-up. ``error`` among them makes it a failed section that has figures.
    """

    name: str
    shape: str
    tokens: int | None
    seconds: float
    measure: Callable[[float], Mapping[str, Any]]

    @property
    def label(self) -> str:
        """Name, shape and tokens."""
        return " ".join(str(part) for part in (self.name, self.shape, self.tokens) if part is not None)


class Measurement:
    """Sections that run one after the other, and the file of their figures, which is replaced after each.

    Parameters
    ----------
    path : Path
        The file.
    about : mapping
        What the file says beside the figures.
    seconds : float
        Limit on the time of all sections.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], seconds: float) -> None:
        self.path, self.about, self.started, self.limit = path, dict(about), time.monotonic(), seconds
        self.done: list[dict[str, Any]] = []

    @property
    def failed(self) -> list[str]:
        """Labels of the sections that failed."""
        return [entry["label"] for entry in self.done if entry["status"] == "failed"]

    def run(self, sections: list[Section]) -> None:
        """Run the sections that the time allows for; the others are named as skipped."""
        self._save(complete=False)
        shapes = list(dict.fromkeys(section.shape for section in sections))
        for number, shape in enumerate(shapes):
            end = self._now() + (self.limit - self._now()) / (len(shapes) - number)
            of_shape = [section for section in sections if section.shape == shape]
            for place, section in enumerate(of_shape):
                self.done.append(self._entry(section, end, len(of_shape) - place))
                self._save(complete=False)
                print(json.dumps(self.done[-1]), flush=True)
        self._save(complete=True)

    def estimate(self, section: Section) -> float:
        """Return the seconds that a warm-up and one round take, from the longest section of its kind so far."""
        kind = [
            entry
            for entry in self.done
            if (entry["name"], entry["shape"], entry["status"]) == (section.name, section.shape, "done")
        ]
        if not kind or section.tokens is None:
            return section.seconds
        last = kind[-1]
        once = last["seconds"] * 2 / (1 + last["figures"].get("rounds", 1))
        return float(once * (section.tokens / last["tokens"]) ** GROWTH)

    def _entry(self, section: Section, end: float, left: int) -> dict[str, Any]:
        estimate, room = self.estimate(section), end - self._now()
        entry = {"label": section.label, "name": section.name, "shape": section.shape, "tokens": section.tokens}
        entry |= {"estimated_seconds": round(estimate, 1)}
        if estimate > room:
            return entry | {"status": "skipped", "why": f"{room:.0f} seconds were left"}
        before = self._now()
        try:
            figures = dict(section.measure(room / left))
        except Exception as error:
            entry |= {"status": "failed", "error": f"{type(error).__name__}: {error}".strip()}
            entry |= {"trace": traceback.format_exc(limit=-6).splitlines()}
        else:
            entry |= {"status": "failed" if "error" in figures else "done", "figures": figures}
        entry |= {"seconds": round(self._now() - before, 2)}
        gc.collect()  # what a failed section held is free only when its frames are
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return entry

    def _now(self) -> float:
        return time.monotonic() - self.started

    def _save(self, *, complete: bool) -> None:
        labels = {
            status: [entry["label"] for entry in self.done if entry["status"] == status]
            for status in ("skipped", "failed")
        }
        record = self.about | {"complete": complete, "seconds": round(self._now(), 1), **labels, "sections": self.done}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".incomplete")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(self.path)


def side_by_side(
    work: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    lap: Callable[[Callable[[], object]], float],
) -> dict[str, list[float]]:
    """Return the seconds of each kind of work, measured in turn: one round, then more while they fit in `seconds`."""
    took: dict[str, list[float]] = {name: [] for name in work}
    start = time.monotonic()
    for number in range(rounds):
        if number and (time.monotonic() - start) * (number + 1) / number > seconds:
            break
        for name, run in work.items():
            took[name].append(lap(run))
    return took


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median and the range."""
    return {"median": round(statistics.median(values), 5), "range": [round(min(values), 5), round(max(values), 5)]}


def ratio(one: list[float], other: list[float]) -> dict[str, Any]:
    """Return the ratio of two measurements, round by round."""
    return summary([a / b for a, b in zip(one, other, strict=True)])
