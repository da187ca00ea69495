"""Traces of older formats give what they gave when their format was the newest.

``tests/data/traces/format-1`` and ``format-4`` are imports of one file by the last kvscope that wrote each format, and
``tests/data/old_traces.json`` has what that kvscope replayed from them: the step at which each key left, and means.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvscope.core.errors import TraceError
from kvscope.core.options import OutputOptions
from kvscope.replay.compile import compile_replay
from kvscope.sharing.kinds import TRACE
from kvscope.sharing.pack import pack
from kvscope.sharing.unpack import PackedFile, unpack
from kvscope.trace.reader import open_trace

DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "old_traces.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_trace_gives_unchanged_results(name: str, tmp_path: Path) -> None:
    trace, expected = open_trace(DATA / "traces" / name, verify=True), EXPECTED[name]
    assert (trace.record.schema, trace.identity) == (int(name[-1]), expected["identity"])
    job = compile_replay(trace, list(expected["runs"]), "30%")
    replay = job.execute(OutputOptions(tmp_path / "r", False, None))
    assert [run.policy for run in replay.summary.runs] == list(expected["runs"])
    for run in replay.summary.runs:
        was = expected["runs"][run.policy]
        held = replay.residency(run.run).sort_values(["layer", "kv_head", "key"])
        assert held["leave"].fillna(-1).to_numpy(int).reshape(2, 2, 24).tolist() == was["leave"], run.policy
        for metric, mean in was["metrics"].items():
            now = run.metrics[metric].mean
            assert (now is None) == (mean is None) and (now is None or np.isclose(now, mean, rtol=1e-6)), metric


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_trace_is_packed_and_checked(name: str, tmp_path: Path) -> None:
    pack(DATA / "traces" / name, TRACE, tmp_path / "p.tar")
    with (tmp_path / "p.tar").open("rb") as stream:
        back = unpack(PackedFile(stream, "p.tar"), tmp_path / "back")
    assert open_trace(back, verify=True).identity == EXPECTED[name]["identity"]


@pytest.mark.parametrize("name", EXPECTED)
def test_damage_of_an_old_trace_is_seen(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / "traces" / name, tmp_path / name)
    file = tmp_path / name / "attention" / "layer=001.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(TraceError, match="checksum differs"):
        open_trace(tmp_path / name).attention(0, 1)
