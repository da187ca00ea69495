"""A replay must come back as it was written, and nothing else may pass for one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import OutputExists, ResultError, UsageError
from kvscope.core.records import RUN_FILE as RUN
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.seal import sealed
from kvscope.results import writer as writing
from kvscope.results.store import newest_replay, open_replay
from kvscope.results.writer import ReplayWriter
from tests.reference import residency as reference
from tests.results.make import info, make, values

# Steps at which a key comes and goes in turn; an odd number of them ends in a stay without an end.
TURNS = st.lists(st.integers(0, 8), max_size=5).map(sorted)
STAYS = st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, 7)), TURNS, max_size=12)


@given(STAYS)
@settings(max_examples=40, deadline=None)
def test_residency_comes_back(tmp_path_factory, drawn) -> None:
    intervals_drawn = [
        (head, key, max(turns[at], key), max(turns[at + 1], key) if at + 1 < len(turns) else None)
        for (head, key), turns in drawn.items()
        for at in range(0, len(turns), 2)
    ]
    path = tmp_path_factory.mktemp("r") / "replay"
    with ReplayWriter(path, info([8], policies=("h2o",))) as writer:
        written = [(head, key, enter, -1 if left is None else left) for head, key, enter, left in intervals_drawn]
        head, key, enter, leave = np.array(written, int).reshape(-1, 4).T
        intervals = ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=2, length=8)
        writer.residency(0, 0, 0, intervals)
        writer.fidelity(0, 0, 0, np.arange(8), values(0, 8))
        made = writer.finish()
    expected = reference.resident(intervals_drawn, 2, 8)
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
    assert made.info.seconds == 0.5


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


def test_a_header_without_its_parts_is_damaged(tmp_path: Path) -> None:
    make(tmp_path / "r", [5])
    file = tmp_path / "r" / RUN
    whole = json.loads(file.read_text())
    for part in ("sizes", "checksums", "created", "runs", "trace", "metrics"):
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != part}))
        with pytest.raises(ResultError, match=f"damaged: .*`{part}`"):
            open_replay(tmp_path / "r", verify=True)
        with pytest.raises(ResultError, match="no complete replay"):
            newest_replay(tmp_path)


def test_the_newest_replay_is_a_whole_one(tmp_path: Path) -> None:
    make(tmp_path / "old", [5])
    make(tmp_path / "cut", [5])
    file = tmp_path / "cut" / RUN
    later = json.loads(file.read_text()) | {"created": "9999-01-01T00:00:00+00:00"}
    file.write_text(json.dumps(later))
    assert newest_replay(tmp_path) == tmp_path / "old", "its checksum differs"
    file.write_text(json.dumps(sealed(later)))
    assert newest_replay(tmp_path) == tmp_path / "cut"
    (tmp_path / "cut" / "fidelity.parquet").unlink()
    assert newest_replay(tmp_path) == tmp_path / "old"


@pytest.mark.parametrize(("where", "what"), [((9, 0, 0), "run 9"), ((0, -1, 0), "sequence -1"), ((0, 0, 7), "layer 7")])
def test_what_was_not_replayed_is_not_an_empty_cache(tmp_path: Path, where: tuple[int, int, int], what: str) -> None:
    made = make(tmp_path / "r", [5])
    for ask in (made.resident, made.visible):
        with pytest.raises(UsageError, match=f"has no {what}"):
            ask(*where)


def test_a_layer_with_enough_rows_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "GROUP_ROWS", 1)
    make(tmp_path / "r", [6, 5])
    for name in ("residency", "fidelity"):
        file = pq.ParquetFile(tmp_path / "r" / f"{name}.parquet")
        groups = [file.read_row_group(i, columns=["run", "sequence", "layer"]) for i in range(file.num_row_groups)]
        assert [group.group_by(group.column_names).aggregate([]).num_rows for group in groups] == [1] * (2 * 2 * 2)


@pytest.mark.parametrize("name", ["r", "r.incomplete"])
def test_force_removes_nothing_but_replays(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(ResultError, match=r"holds thesis\.txt, which no replay has"):
        make(tmp_path / "r", [5], force=True)
    assert (folder / "thesis.txt").read_text() == "years"
    (tmp_path / "file").write_text("years")
    (tmp_path / "link").symlink_to(folder)
    for other in ("file", "link"):
        with pytest.raises(ResultError, match="is not a folder of a replay"):
            make(tmp_path / other, [5], force=True)
    assert (tmp_path / "file").read_text() == "years"


def test_what_came_while_writing_is_not_removed(tmp_path: Path) -> None:
    with ReplayWriter(tmp_path / "r", info([5], policies=("h2o",)), force=True) as writer:
        writer.fidelity(0, 0, 0, np.arange(5), values(0, 5))
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "thesis.txt").write_text("years")
        with pytest.raises(ResultError, match="holds thesis"):
            writer.finish()
    assert (tmp_path / "r" / "thesis.txt").read_text() == "years"


def test_a_cut_header_of_a_killed_replay_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.incomplete").mkdir()
    (tmp_path / "r.incomplete" / RUN).write_text('{"kind": "kvsc')
    assert make(tmp_path / "r", [5]).path == tmp_path / "r"
    assert not (tmp_path / "r.incomplete").exists()


def test_an_infinite_value_is_refused_where_it_is(tmp_path: Path) -> None:
    bad = values(0, 5)
    bad["output_error"][0, 3] = np.inf
    with (
        ReplayWriter(tmp_path / "r", info([5])) as writer,
        pytest.raises(ResultError, match="output_error is infinite: run 0, sequence 0, layer 1"),
    ):
        writer.fidelity(0, 0, 1, np.arange(5), bad)


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    make(tmp_path / "r", [5])
    with pytest.raises(OutputExists, match="exists"):
        ReplayWriter(tmp_path / "r", info([5]))
    assert make(tmp_path / "r", [7], force=True).info.trace.sequences[0].length == 7


def test_a_killed_replay_never_passes_for_one(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from tests.results.make import info\n"
        "from kvscope.results.writer import ReplayWriter\n"
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
    with pytest.raises(ResultError, match="no complete replay"):
        newest_replay(tmp_path)
    make(tmp_path / "r", [5])
    assert newest_replay(tmp_path) == tmp_path / "r"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ReplayWriter(tmp_path / "r", info([5])) as writer:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writing, "GROUP_ROWS", 1)
        monkeypatch.setattr(writer._files["fidelity"]._writer, "write_table", full)
        writer.fidelity(0, 0, 0, np.arange(5), values(0, 5))
        with pytest.raises(ResultError, match="is full"):
            writer.finish()
