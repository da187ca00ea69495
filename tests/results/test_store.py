"""A replay must come back as it was written, and nothing else may pass for one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.errors import ResultError
from kvscope.results.schema import RUN
from kvscope.results.store import ReplayWriter, newest_replay, open_replay
from tests.reference import residency as twin
from tests.results.make import info, make, values

STAYS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 7), st.one_of(st.none(), st.integers(0, 9))),
    max_size=20,
    unique_by=lambda stay: stay[:2],
)


@given(STAYS)
@settings(max_examples=40, deadline=None)
def test_residency_comes_back(tmp_path_factory, drawn) -> None:
    stays = [(head, key, key, None if left is None else max(left, key)) for head, key, left in drawn]
    path = tmp_path_factory.mktemp("r") / "replay"
    with ReplayWriter(path, info([8], policies=("h2o",))) as writer:
        written = [(head, key, enter, -1 if left is None else left) for head, key, enter, left in stays]
        head, key, enter, leave = np.array(written, int).reshape(-1, 4).T
        writer.residency(0, 0, 0, enter=enter, leave=leave, kv_head=head, key=key)
        writer.fidelity(0, 0, 0, np.arange(8), values(0, 8))
        made = writer.finish()
    expected = twin.resident(stays, 2, 8)
    mask, visible = made.resident(0, 0, 0), made.visible(0, 0, 0)
    for head in range(2):
        for t in range(8):
            assert set(np.flatnonzero(mask[head, t])) == expected[head][t]
            before = expected[head][t - 1] if t else set()
            assert set(np.flatnonzero(visible[head, t])) == before | {t}


def test_fidelity_comes_back(tmp_path: Path) -> None:
    made = make(tmp_path / "r", [6, 5])
    frame = made.fidelity(run=1, sequence=1, layer=1)
    assert len(frame) == 4 * 5
    expected = values(100 + 10 + 1, 5)["retained_mass"]
    assert np.allclose(frame["retained_mass"].to_numpy().reshape(4, 5), expected, equal_nan=True)
    assert frame["retained_mass"].isna().sum() == 8
    assert made.residency(run=0, sequence=0, layer=0)["leave"].isna().sum() == 2 * 4
    assert made.info["seconds"] == 0.5


def test_messages_tell_apart_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no replay at"):
        open_replay(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(ResultError, match="is not a kvscope replay"):
        open_replay(tmp_path / "other")
    make(tmp_path / "r", [5])
    file = tmp_path / "r" / RUN
    whole = json.loads(file.read_text())
    for change, message in [
        ({"schema": 0}, "older format 0"),
        ({"schema": 99}, "newer than this kvscope"),
        ({"complete": False}, "is incomplete"),
        ({"kind": "x"}, "is not a kvscope replay"),
    ]:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ResultError, match=message):
            open_replay(tmp_path / "r")
    file.write_text(json.dumps(whole))
    content = (tmp_path / "r" / "fidelity.parquet").read_bytes()
    (tmp_path / "r" / "fidelity.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ResultError, match=r"damaged: fidelity.parquet"):
        open_replay(tmp_path / "r")
    (tmp_path / "r" / "fidelity.parquet").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ResultError, match="checksum"):
        open_replay(tmp_path / "r", verify=True)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    make(tmp_path / "r", [5])
    with pytest.raises(ResultError, match="exists"):
        ReplayWriter(tmp_path / "r", info([5]))
    assert make(tmp_path / "r", [7], force=True).info["trace"]["sequences"][0]["length"] == 7


def test_a_killed_replay_never_passes_for_one(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from tests.results.make import info\n"
        "from kvscope.results.store import ReplayWriter\n"
        f"w = ReplayWriter(Path({str(tmp_path / 'r')!r}), info([5])); print('writing', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    with pytest.raises(ResultError, match=f"process {child.pid} is writing"):
        ReplayWriter(tmp_path / "r", info([5]))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(ResultError, match="incomplete"):
        open_replay(tmp_path / "r")
    with pytest.raises(ResultError, match="no whole replay"):
        newest_replay(tmp_path)
    make(tmp_path / "r", [5])
    assert newest_replay(tmp_path) == tmp_path / "r"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReplayWriter(tmp_path / "r", info([5])) as writer:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer._writers["fidelity"], "write_table", full)
        with pytest.raises(ResultError, match="is full"):
            writer.fidelity(0, 0, 0, np.arange(5), values(0, 5))
