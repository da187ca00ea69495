"""The order of sequences, layers, prompts and files permutes results and refusals, and changes nothing else."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvscope.results.store import open_replay
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import SequenceRecord
from kvscope.trace.writer import TraceWriter
from tests.cli.conftest import Run, run  # noqa: F401  a fixture
from tests.trace.make import header, rows_of

LENGTHS = (12, 20, 7, 16, 20)
STORED = ["maps", "value_l1", "value_l2", "key_l2"]
POLICIES = ("h2o", "tova", "snapkv", "vatp", "window", "belady", "key-norm", "a2sf:alpha=0.5")
DRAW = random.Random(11)
ORDERS = [list(range(5)), *(DRAW.sample(range(5), 5) for _ in range(3))]


def make(path: Path, order: Sequence[int], layers: Sequence[int] = (0, 2)) -> None:
    """Write a trace whose sequences are in this order, and whose layers are written in this order."""
    with TraceWriter(path, header(stored=STORED)) as writer:
        for layer in layers:
            for place, which in enumerate(order):
                length = LENGTHS[which]
                writer.attention(layer, place, 0, rows_of(10 * which + layer, 2, length))
                norms = np.random.default_rng(which + layer).random((2, length), np.float32) + 1
                writer.keys(layer, place, 0, **dict.fromkeys(STORED[1:], norms))
        for place, which in enumerate(order):
            length = LENGTHS[which]
            unknown, prompt = np.full(length, np.nan), np.arange(length) < length // 2
            ids, text = np.arange(length), [f"{which}.{index}" for index in range(length)]
            writer.tokens(place, token_id=ids, text=text, is_prompt=prompt, logprob=unknown, entropy=unknown)
        writer.finish([SequenceRecord(LENGTHS[which] // 2, LENGTHS[which]) for which in order])


def replayed(run: Run, name: str, *more: str) -> dict[str, pd.DataFrame]:  # noqa: F811
    chosen = [policy for policy in POLICIES if policy != "snapkv" or "stream" not in more]
    given = [part for policy in chosen for part in ("-p", policy)]
    done = run("replay", f"traces/{name}", *given, "-b", "60%,6", "-o", name, *more, "-q")
    assert done.status == 0, done.err
    replay = open_replay(Path("reports") / name)
    return {"fidelity": replay.fidelity(), "residency": replay.residency()}


def ordered(frame: pd.DataFrame, order: Sequence[int]) -> pd.DataFrame:
    """Return a frame with the numbers that its sequences have in the first order, sorted."""
    named = frame.assign(sequence=np.asarray(order)[frame["sequence"].to_numpy(int)])
    keys = [name for name in named.columns if not pd.api.types.is_float_dtype(named[name].dtype)]
    return named.sort_values(keys).reset_index(drop=True)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_permuting_sequences_permutes_results(prefill: str, run: Run) -> None:  # noqa: F811
    found = []
    for number, order in enumerate(ORDERS):
        make(Path(f"traces/t{number}"), order)
        made = replayed(run, f"t{number}", "--prefill", prefill)
        found.append({name: ordered(frame, order) for name, frame in made.items()})
    for other in found[1:]:
        for name, frame in found[0].items():
            pd.testing.assert_frame_equal(frame, other[name], check_exact=True)


@pytest.mark.parametrize(
    ("more", "status"),
    [(["-b", "1%"], 0), (["-b", "19"], 0), (["-b", "0"], 2), (["-p", "streaming-llm", "-b", "30%"], 2)],
)
def test_permuting_sequences_permutes_no_refusal(run: Run, more: list[str], status: int) -> None:  # noqa: F811
    """A check that looks at the first sequence only would accept some of the orders."""
    found = set()
    for number, order in enumerate(ORDERS):
        make(Path(f"traces/t{number}"), order)
        done = run("replay", f"traces/t{number}", "-p", "h2o", *more, "-o", f"r{number}", "-q")
        found.add((done.status == 0, done.err.replace(f"t{number}", "t")))
    assert len(found) == 1, found
    assert next(iter(found))[0] == (status == 0)


def test_the_order_in_which_layers_are_written_changes_nothing(run: Run) -> None:  # noqa: F811
    make(Path("traces/a"), ORDERS[1], (0, 2))
    make(Path("traces/b"), ORDERS[1], (2, 0))
    a, b = open_trace(Path("traces/a")), open_trace(Path("traces/b"))
    assert (a.identity, a.record.checksums) == (b.identity, b.record.checksums)
    made = replayed(run, "b")
    for name, frame in replayed(run, "a").items():
        pd.testing.assert_frame_equal(frame, made[name], check_exact=True)


def bad_maps(order: Sequence[int], bad: int) -> np.ndarray:
    """Return attention ``[L, B, H, T, T]`` of three sequences, of which one has a row that does not sum to one."""
    maps = [np.stack([rows_of(10 * which + layer, 2, 8) for layer in range(2)]) for which in range(3)]
    maps[bad][1, 0, 5, 2] += 0.5
    return np.stack([maps[which] for which in order], 1)


@pytest.mark.parametrize("bad", range(3))
def test_permuting_sequences_of_an_import_permutes_its_refusal(run: Run, bad: int) -> None:  # noqa: F811
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        np.savez("maps.npz", attention=bad_maps(order, bad))
        what, _ = run("import", "maps.npz", "--prompt-length", "4", "--axes", "LBHTT", "-o", "t").two_lines()
        assert f"sequence {order.index(bad)}" in what, what


# --- prompts and files, with the bundled model

PROMPTS = {
    "one": "The keeper lit the lamp every night.",
    "two": "Once upon a time there was a small house by the sea, and nobody lived in it.",
    "three": "What is the question?",
    "four": "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
}


def recorded(run: Run, name: str, *given: str) -> Trace:  # noqa: F811
    done = run("trace", "--model", "demo", *given, "--max-new-tokens", "4", "-o", name, "-q")
    assert done.status == 0, done.err
    return open_trace(Path("traces") / name)


def contents(trace: Trace) -> dict[str, tuple[object, ...]]:
    """Return what a trace has of each prompt, by the checksum of its text."""
    found = {}
    for number, prompt in enumerate(trace.header.prompts):
        arrays = [trace.attention(number, layer) for layer in trace.layers]
        arrays += [read(number, layer) for layer in trace.layers for read in (trace.value_norms, trace.key_norms)]
        tokens = trace.tokens(number).drop(columns="sequence", errors="ignore").to_csv()
        found[prompt.sha256] = (
            trace.sequences[number].prompt,
            trace.sequences[number].length,
            tokens,
            *(array.tobytes() for array in arrays),
        )
    return found


@pytest.mark.parametrize("form", ["files", "jsonl"])
def test_permuting_prompts_permutes_the_sequences(run: Run, form: str) -> None:  # noqa: F811
    traces = []
    for number, names in enumerate((list(PROMPTS), ["three", "one", "four", "two"])):
        if form == "jsonl":
            Path("p.jsonl").write_text("".join(json.dumps({"prompt": PROMPTS[name]}) + "\n" for name in names))
            traces.append(recorded(run, f"t{number}", "p.jsonl"))
        else:
            for name in names:
                Path(f"{name}.txt").write_text(PROMPTS[name])
            traces.append(recorded(run, f"t{number}", *(f"{name}.txt" for name in names)))
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in PROMPTS.items()}
    assert [each.sha256 for each in traces[0].header.prompts] == list(digests.values())
    assert [each.sha256 for each in traces[1].header.prompts] == [digests[name] for name in names]
    one, other = map(contents, traces)
    assert one == other


@pytest.mark.parametrize("bad", ["", "a\0b", "word " * 3000])
def test_permuting_files_permutes_no_refusal(run: Run, bad: str) -> None:  # noqa: F811
    Path("good.txt").write_text(PROMPTS["one"])
    Path("other.txt").write_text(PROMPTS["two"])
    Path("bad.txt").write_text(bad)
    orders = (["good.txt", "other.txt", "bad.txt"], ["bad.txt", "good.txt", "other.txt"])
    said = {run("trace", "--model", "demo", *order, "--max-new-tokens", "4", "-q").two_lines() for order in orders}
    assert len(said) == 1 and "bad.txt" in said.pop()[0]
    assert not list(Path("traces").glob("*"))


def test_the_order_of_layers_and_heads_changes_nothing(run: Run) -> None:  # noqa: F811
    Path("p.txt").write_text(PROMPTS["two"])
    given = [("--layers", "3,0,2", "--heads", "2,3,0,1"), ("--layers", "0,2,3", "--heads", "0,1,2,3")]
    one, other = (recorded(run, f"t{number}", "p.txt", *options) for number, options in enumerate(given))
    assert one.layers == other.layers == [0, 2, 3]
    assert contents(one) == contents(other)
    said = {run("trace", "--model", "demo", "p.txt", "--layers", each, "-q").two_lines() for each in ("9,0,8", "8,9,0")}
    assert len(said) == 1
