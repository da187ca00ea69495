"""Decisions from a trace of vectors equal those from a trace of rows, up to the rounding of rows to 16 bits."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvscope.model.generate import trace
from kvscope.model.names import demo_folder
from kvscope.replay.run import replay
from kvscope.trace.reader import Trace

POLICIES = ["window", "h2o", "tova", "a2sf", "scissorhands", "vatp", "keydiff"]
STAY = ["run", "sequence", "layer", "kv_head", "key", "enter"]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Trace]:
    place = tmp_path_factory.mktemp("traces")
    prompt = place / "prompt.txt"
    prompt.write_text((demo_folder() / "prompt.txt").read_text()[:600])
    made = [
        trace("demo", [prompt], output=place / store, max_new_tokens=48, store=store)
        for store in ("maps+vectors", "qkv")
    ]
    return made[0], made[1]


def different(one: Trace, other: Trace, place: Path) -> float:
    """Return the share of residency intervals that end at another step."""
    stays = []
    for name, source in (("one", one), ("other", other)):
        made = replay(source, POLICIES, "20%", output=place / name, metrics=["retained_mass"])
        stays.append(pd.read_parquet(made.path / "residency.parquet"))
    both = stays[0].merge(stays[1], on=STAY, how="outer", suffixes=("_one", "_other"), indicator=True)
    same = (both["_merge"] == "both") & (both["leave_one"].fillna(-1) == both["leave_other"].fillna(-1))
    return 1 - float(same.mean())


def test_decisions_differ_by_the_rounding_alone(
    traces: tuple[Trace, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, qkv = traces
    assert different(maps, qkv, tmp_path / "exact") < 0.05
    exact = qkv.attention
    monkeypatch.setattr(qkv, "attention", lambda *at: exact(*at).astype(np.float16).astype(np.float32))
    assert different(maps, qkv, tmp_path / "rounded") < 0.002  # a weight may be rounded up or down
