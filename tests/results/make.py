"""Small replays for tests, made without a replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvscope.core.output import checksum
from kvscope.core.records import REPLAY, RUN_FILE, ReplayRecord
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.seal import sealed
from kvscope.core.summary_records import SUMMARY_FILE
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter

METRICS = {
    "retained_mass": {"direction": "higher", "range": [0, 1], "when_nothing_evicted": 1.0, "summary": ""},
    "output_error": {"direction": "lower", "range": [0, None], "when_nothing_evicted": 0.0, "summary": ""},
    "held_keys": {"direction": "none", "range": [0, None], "when_nothing_evicted": None, "summary": ""},
}


def info(lengths: list[int], identity: str = "abc", policies: tuple[str, ...] = ("h2o", "tova")) -> ReplayRecord:
    data = {
        "trace": {
            "name": "t",
            "path": "traces/t",
            "identity": identity,
            "model": "test/tiny",
            "sequences": [{"prompt": 2, "length": length} for length in lengths],
            "layers": [0, 1],
            "heads": 4,
            "kv_heads": 2,
        },
        "prefill": "stream",
        "loop": "open",
        "metrics": METRICS,
        "runs": [
            {
                "run": number,
                "policy": name,
                "label": name,
                "params": {},
                "budget": "50%",
                "budget_keys": [max(1, length // 2) for length in lengths],
                "prefill": "stream",
                "phase": "step",
                "loop": "open",
                "scope": "kv_head",
            }
            for number, name in enumerate(policies)
        ],
        "versions": {},
        "command": None,
    }
    return REPLAY.decode(data, Path("run.json"), ReplayRecord)


def values(seed: int, length: int, empty: bool = False) -> dict[str, np.ndarray]:
    """Return ``[H, S]`` values, the first two steps without any."""
    random = np.random.default_rng(seed)
    result = {}
    for name in METRICS:
        result[name] = random.random((4, length)).astype(np.float32)
        result[name][:, : length if empty else 2] = np.nan
    return result


def make(path: Path, lengths: list[int], *, shift: float = 0.0, force: bool = False, **of_info: Any) -> Replay:
    """Return a replay of two runs with random values; `shift` is added to every value."""
    about = info(lengths, **of_info)
    with ReplayWriter(path, about, force=force) as writer:
        for run in range(len(about.runs)):
            for sequence, length in enumerate(lengths):
                for layer in (0, 1):
                    key = np.tile(np.arange(length), 2)
                    head = np.repeat([0, 1], length)
                    leave = np.where(key % 3 == run % 3, key + 1, -1)
                    intervals = ResidencyIntervals.of(
                        kv_head=head, key=key, enter=key, leave=leave, heads=2, length=length
                    )
                    writer.residency(run, sequence, layer, intervals)
                    of_layer = values(100 * run + 10 * sequence + layer, length)
                    writer.fidelity(
                        run, sequence, layer, np.arange(length), {n: v + np.float32(shift) for n, v in of_layer.items()}
                    )
        return writer.finish(seconds=0.5)


def with_summary(replay: Replay, run: int, **changes: Any) -> Replay:
    """Return a replay whose summary says something else of one run, as a replay on disk might."""
    summary = replay.summary
    runs = tuple(replace(each, **changes) if each.run == run else each for each in summary.runs)
    made = Replay(replay.path, replay.info)
    made.__dict__["summary"] = replace(summary, runs=runs)
    return made


def change(path: Path, fields: dict[str, object]) -> None:
    """Change fields of the first run of a replay, in both of its JSON files, with the checksums that fit."""
    files = {name: json.loads((path / name).read_text()) for name in (SUMMARY_FILE, RUN_FILE)}
    for data in files.values():
        data["runs"][0] |= fields
    content = json.dumps(sealed(files[SUMMARY_FILE]))
    (path / SUMMARY_FILE).write_text(content)
    files[RUN_FILE]["sizes"][SUMMARY_FILE] = len(content)
    files[RUN_FILE]["checksums"][SUMMARY_FILE] = checksum(path / SUMMARY_FILE)
    (path / RUN_FILE).write_text(json.dumps(sealed(files[RUN_FILE])))
