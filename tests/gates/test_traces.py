"""Training on recorded attention: the keys that an optimal gate retains, and that a gate learns to retain them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.core.errors import TraceError, UsageError
from kvscope.core.gate_options import EvictionLoss, GateDesign, GateForm, TrainingSettings
from kvscope.gates.module import load_gate
from kvscope.model.generate import trace
from kvscope.replay.run import replay
from kvscope.trace.reader import Trace
from kvscope.training.tasks import RecordedMass, best_keys, future_mass
from kvscope.training.train_gate import train_on_traces
from tests.model.tiny import saved

PROMPT, NEW = 20, 16
HELD_OUT = Path(__file__).parents[1] / "data" / "demo_heldout.json"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Six sequences of a tiny model, with layer inputs."""
    folder = tmp_path_factory.mktemp("traces")
    saved(folder / "model")
    return record(folder, [list(range(seed, seed + PROMPT)) for seed in (1, 9, 20, 31, 40, 44)])


def record(folder: Path, prompts: list[list[int]], **more: Any) -> Trace:
    files = []
    for number, words in enumerate(prompts):
        files.append(folder / f"p{number}.txt")
        files[-1].write_text(" ".join(f"w{word % 63 + 1}" for word in words))
    given = {"max_new_tokens": NEW, "do_sample": True, "hidden": True, "force": True, **more}
    return trace(str(folder / "model"), files, output=folder / "t", **given)


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_future_mass_is_what_later_queries_pay(form: str, recorded: Trace) -> None:
    for layer in range(2):
        rows = recorded.attention(1, layer)  # [H, T, T]
        length = rows.shape[-1]
        keys, first = (PROMPT, PROMPT) if form == "bidirectional" else (length, 0)
        expected = np.zeros((2, keys))
        for head, t in np.ndindex(4, length):
            for key in range(min(t, keys)):
                expected[head // 2, key] += rows[head, t, key] / 2 if t >= first else 0
        found = future_mass(recorded, 1, layer, form)
        assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_no_other_choice_of_as_many_keys_retains_more(form: str, recorded: Trace) -> None:
    """Compare the keys of the optimal gate with many other choices of the same size."""
    share = 0.4
    chosen = best_keys(recorded, 0, share, form)
    for layer, keep in enumerate(chosen):
        assert int(keep.sum()) == round(share * keep.numel())
        mass = future_mass(recorded, 0, layer, form).flatten()
        best, random = float(mass[keep.flatten()].sum()), torch.Generator().manual_seed(layer)
        for _ in range(50):
            other = torch.randperm(mass.numel(), generator=random)[: int(keep.sum())]
            assert float(mass[other].sum()) <= best + 1e-6


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Passages of books that the bundled model reads."""
    folder = tmp_path_factory.mktemp("read")
    passages = json.loads(HELD_OUT.read_text())["passages"][:5]
    lines = [json.dumps({"prompt": text[:300], "continuation": text[300:500]}) for text in passages]
    (folder / "passages.jsonl").write_text("\n".join(lines))
    return trace("demo", [folder / "passages.jsonl"], output=folder / "t")


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_a_gate_learns_it_without_the_model(form: Any, read: Trace, tmp_path: Path) -> None:
    settings = TrainingSettings(0.4, EvictionLoss.square, strength=5, steps=80, rate=0.005, every=20)
    made = train_on_traces(
        [read], tmp_path / "g.safetensors", design=GateDesign(form=GateForm(form)), settings=settings
    )
    assert made.best.loss < made.log[0].loss - 0.05
    assert abs(made.best.keep - 0.4) < 0.1  # one passage judges
    facts = load_gate(str(made.path)).facts
    assert facts.provenance["task"] == "distilled"
    assert facts.provenance["traces"] == [{"name": "t", "identity": read.identity}]
    found = replay(read, [f"attention-gate:gate={made.path}", "random"], "40%", output=tmp_path / "r")
    gated, random = (run.metrics["retained_mass_no_sinks"].mean for run in found.summary.runs)
    assert gated > random, "it keeps what is looked at"


def test_the_same_again(recorded: Trace, tmp_path: Path) -> None:
    settings = TrainingSettings(0.4, EvictionLoss.absolute, steps=10, every=5)
    one, other = (
        train_on_traces([recorded], tmp_path / name, settings=settings, design=GateDesign(form=GateForm.bidirectional))
        for name in ("one", "other")
    )
    assert one.path.read_bytes() == other.path.read_bytes()


def test_every_sequence_comes_in_turn_and_some_are_never_trained_on(recorded: Trace) -> None:
    task = RecordedMass([recorded], 0.5, "causal", 3)
    seen: list[int] = []
    task._loss = lambda gate, place: seen.append(place)  # type: ignore[method-assign, assignment, func-returns-value]
    for number in range(10):
        task.step(None, number)  # type: ignore[arg-type]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 2, 3, 4, 5]
    assert seen[:5] != seen[5:], "in another order"
    list(task.held_out(None))  # type: ignore[arg-type]
    assert seen[10:] == [1]


def test_traces_that_cannot_be_learned_from_are_refused(recorded: Trace, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden": False}, "has no layer inputs"),
        ({"store": "qkv"}, ""),
        ({"layers": [0]}, "has 1 of 2 layers"),
    ]
    for more, message in cases:
        made = record(tmp_path, [[1, 2, 3], [4, 5, 6]], **more)
        if message:
            with pytest.raises(TraceError, match=message):
                RecordedMass([made], 0.5, "causal", 0)
        else:
            assert RecordedMass([made], 0.5, "causal", 0), "rows that follow from vectors are as good"
    with pytest.raises(UsageError, match="one sequence is too few"):
        RecordedMass([record(tmp_path, [[1, 2, 3]])], 0.5, "causal", 0)
    with pytest.raises(UsageError, match="no trace is given"):
        train_on_traces([], tmp_path / "g")


def test_traces_of_different_models_are_refused(recorded: Trace, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    other = record(tmp_path, [[1, 2, 3], [4, 5, 6]])
    other.header.model.weights[0] += 1
    with pytest.raises(TraceError, match="are of different models"):
        RecordedMass([recorded, other], 0.5, "causal", 0)
