"""Decisions: one that differs is found and named, and one that does not is never reported."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import ResultError
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.seal import sealed
from kvscope.results.baseline import load_summary
from kvscope.results.decisions import Decisions, ResidencyChange, compare_decisions
from kvscope.results.diff import diff
from kvscope.results.digest import Digests
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from tests.results.make import change, info, make, values

LENGTH = 6
Stay = tuple[int, int, int, int]  # kv_head, key, enter, leave


def record(path: Path, of_layers: dict[tuple[int, int], list[Stay]], length: int = LENGTH) -> Replay:
    """Return a replay of one run with these stays, by sequence and layer."""
    sequences = 1 + max(sequence for sequence, _ in of_layers)
    with ReplayWriter(path, info([length] * sequences, policies=("h2o",))) as writer:
        for (sequence, layer), stays in of_layers.items():
            writer.residency(0, sequence, layer, intervals_of(stays, length))
            writer.fidelity(0, sequence, layer, np.arange(length), values(0, length))
        return writer.finish()


def intervals_of(stays: list[Stay], length: int = LENGTH) -> ResidencyIntervals:
    head, key, enter, leave = np.array(stays, int).reshape(-1, 4).T
    return ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=2, length=length)


def compared(base: Path, new: Path, most: int = 10) -> Decisions:
    one, other = load_summary(base), load_summary(new)
    return compare_decisions("h2o", (str(base), one.runs[0]), (str(new), other.runs[0]), most)


def kept(**leave: int) -> list[Stay]:
    """Return stays of both heads; ``h1k2=5`` says that key 2 of head 1 leaves at 5, all others stay."""
    return [(head, key, key, leave.get(f"h{head}k{key}", -1)) for head in (0, 1) for key in range(LENGTH)]


def test_what_changed_is_named_earliest_first(tmp_path: Path) -> None:
    record(tmp_path / "a", {(0, 0): kept(h0k1=5, h1k2=4), (0, 1): kept(h0k0=3), (1, 0): kept(), (1, 1): kept()})
    record(tmp_path / "b", {(0, 0): kept(h0k1=5), (0, 1): kept(h0k0=3), (1, 0): kept(h1k3=4, h0k0=2), (1, 1): kept()})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert (found.equal, found.changed, found.stays) == (False, 3, 4 * 2 * LENGTH)
    assert found.first == [
        ResidencyChange(1, 0, 0, 0, 2, base=(0, None), new=(0, 2)),
        ResidencyChange(0, 0, 1, 2, 4, base=(2, 4), new=(2, None)),
        ResidencyChange(1, 0, 1, 3, 4, base=(3, None), new=(3, 4)),
    ]
    assert [moved.words() for moved in found.first[:2]] == [("retained", "evicted at 2"), ("evicted at 4", "retained")]
    assert compared(tmp_path / "a", tmp_path / "b", most=1).first == found.first[:1]


def test_keys_that_come_back_are_paired_in_order(tmp_path: Path) -> None:
    record(tmp_path / "a", {(0, 0): [(0, 0, 0, 2), (0, 0, 3, 4), (0, 1, 1, -1)]})
    record(tmp_path / "b", {(0, 0): [(0, 0, 0, 2), (0, 0, 3, 5), (0, 1, 1, 2), (0, 1, 4, -1), (0, 2, 2, -1)]})
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.first == [
        ResidencyChange(0, 0, 0, 1, 2, base=(1, None), new=(1, 2)),
        ResidencyChange(0, 0, 0, 2, 2, base=None, new=(2, None)),
        ResidencyChange(0, 0, 0, 0, 4, base=(3, 4), new=(3, 5)),
        ResidencyChange(0, 0, 0, 1, 4, base=None, new=(4, None)),
    ]
    assert [moved.words()[0] for moved in found.first] == ["retained", "not held", "held 3 to 3", "not held"]
    assert found.first[3].words()[1] == "held from 4"


CHANGES = st.dictionaries(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(0, LENGTH - 1)),
    st.integers(1, LENGTH - 1),
    max_size=5,
)


@given(CHANGES, CHANGES)
@settings(max_examples=30, deadline=None)
def test_the_digest_and_the_comparison_agree_with_plain_loops(tmp_path_factory, one, other) -> None:
    folder = tmp_path_factory.mktemp("r")
    for name, changes in (("a", one), ("b", other)):
        layers = {(s, layer): [] for s in (0, 1) for layer in (0, 1)}
        for sequence, layer, head, key in np.ndindex(2, 2, 2, LENGTH):
            leave = changes.get((sequence, layer, head, key), -1)
            layers[sequence, layer].append((head, key, key, max(leave, key) if leave > 0 else -1))
        record(folder / name, layers)

    def left(changes: dict, place: tuple[int, ...]) -> int:
        return max(changes[place], place[3]) if place in changes else LENGTH + 1

    different = {place for place in {*one, *other} if left(one, place) != left(other, place)}
    found = compared(folder / "a", folder / "b")
    assert found.equal == (not different)
    assert {(m.sequence, m.layer, m.kv_head, m.key) for m in found.first} == different
    assert all(
        m.step == min(left(one, place), left(other, place))
        for m in found.first
        for place in [(m.sequence, m.layer, m.kv_head, m.key)]
    )
    assert compared(folder / "a" / "summary.json", folder / "b").equal == found.equal


def test_the_order_of_writing_does_not_matter() -> None:
    random = np.random.default_rng(0)
    rows = np.array(kept(h0k1=5, h1k2=4)).T

    def digest(order: list[tuple[int, int]], shuffle: bool) -> str:
        digests = Digests()
        for sequence, layer in order:
            columns = rows[:, random.permutation(rows.shape[1])] if shuffle else rows
            head, key, enter, leave = (column.astype(np.int64 if shuffle else np.int32) for column in columns)
            digests.add(0, sequence, layer, kv_head=head, key=key, enter=enter, leave=leave)
        return digests.of(0)

    places = [(0, 0), (0, 1), (1, 0)]
    assert digest(places, False) == digest(places[::-1], True)
    assert digest(places, False) != digest([(0, 0), (0, 1), (1, 1)], False)
    assert digest(places, False) != digest(places[:2], False)


def test_the_digest_is_what_its_documentation_says() -> None:
    """A published format: whoever computes it elsewhere must get the same."""
    import hashlib
    import struct

    digests = Digests()
    zero, one = np.zeros(1, int), np.ones(1, int)
    digests.add(3, 0, 7, kv_head=zero, key=one, enter=one, leave=-one)
    layer = hashlib.sha256(struct.pack("<4i", 0, 1, 1, -1)).digest()
    assert digests.of(3) == hashlib.sha256(struct.pack("<2i", 0, 7) + layer).hexdigest()


def test_a_layer_written_twice_is_refused(tmp_path: Path) -> None:
    with ReplayWriter(tmp_path / "r", info([LENGTH], policies=("h2o",))) as writer:
        writer.residency(0, 0, 0, intervals_of(kept()))
        with pytest.raises(ResultError, match="run 0, sequence 0, layer 0 is written twice"):
            writer.residency(0, 0, 0, intervals_of(kept()))


def test_of_a_committed_summary_it_is_said_that_it_differs_and_not_which(tmp_path: Path) -> None:
    record(tmp_path / "a", {(0, 0): kept(h0k1=5)})
    record(tmp_path / "b", {(0, 0): kept(h0k1=4)})
    record(tmp_path / "c", {(0, 0): kept(h0k1=5)})
    committed = tmp_path / "baseline.json"
    committed.write_bytes((tmp_path / "a" / "summary.json").read_bytes())
    assert compared(committed, tmp_path / "c") == Decisions("h2o", True)
    assert compared(committed, tmp_path / "b") == Decisions("h2o", False)
    without = json.loads(committed.read_text())
    del without["runs"][0]["decisions"]
    committed.write_text(json.dumps(sealed(without)))
    with pytest.raises(ResultError, match=r"baseline\.json has no digest of the decisions of h2o"):
        compared(committed, tmp_path / "b")


def test_folders_without_a_digest_are_compared_key_by_key(tmp_path: Path) -> None:
    for name, leave in (("a", 5), ("b", 5), ("c", 4)):
        record(tmp_path / name, {(0, 0): kept(h0k1=leave)})
        change(tmp_path / name, {"decisions": None})
    assert compared(tmp_path / "a", tmp_path / "b").equal
    assert compared(tmp_path / "a", tmp_path / "c").changed == 1


def test_other_decisions_fail_the_build_whatever_the_metrics_say(tmp_path: Path) -> None:
    record(tmp_path / "a", {(0, 0): kept(h0k1=5)})
    record(tmp_path / "b", {(0, 0): kept(h0k1=4)})
    base, new = load_summary(tmp_path / "a"), load_summary(tmp_path / "b")
    assert not diff(base, new).regressed
    assert diff(base, new).decisions is None
    found = diff(base, new, decisions=True, sources=(str(tmp_path / "a"), str(tmp_path / "b")))
    assert found.regressed and not found.regressions
    assert found.verdict().endswith("Decisions differ in 1 of 1 runs.")
    (row,) = json.loads(json.dumps(found.to_dict()))["decisions"]
    assert (row["changed"], row["first"][0]["base"], row["first"][0]["new"]) == (1, [1, 5], [1, 4])
    assert not diff(base, base, decisions=True).regressed


def test_runs_that_stand_on_one_side_only_are_rows_not_decisions(tmp_path: Path) -> None:
    base = load_summary(make(tmp_path / "a", [8]).path)
    new = load_summary(make(tmp_path / "b", [8], policies=("h2o",)).path)
    found = diff(base, new, decisions=True)
    assert [run.run.split()[0] for run in found.decisions or []] == ["h2o"]
    assert {row.verdict for row in found.regressions} == {"missing"}
