"""Training: the same seed gives the same gate, and a resumed training gives the result of an uninterrupted one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.gate_options import EvictionLoss, GateDesign, TextWindows, TrainingSettings
from kvscope.core.options import ModelSource
from kvscope.gates.module import LearnedGate, load_gate
from kvscope.model.sample import sample
from kvscope.training.fit import Evaluation, train
from kvscope.training.tasks import TextReading, Texts
from kvscope.training.train_gate import CHECKPOINT, Trained, train_on_texts
from tests.gates.make import facts
from tests.model.tiny import build, saved, tokens

LENGTH = 24
QUICK = TrainingSettings(target_keep=0.4, eviction=EvictionLoss.square, strength=20, steps=24, rate=0.02, every=6)


def task(model: Any) -> TextReading:
    def texts(seed: int) -> Texts:
        ids = tokens(LENGTH, batch=4, seed=seed)
        return Texts(ids, torch.ones(ids.shape), LENGTH // 2)

    return TextReading(model, texts, [texts(10**6 + number) for number in range(4)])


def untrained(model: Any, seed: int = 0, **more: Any) -> LearnedGate:
    torch.manual_seed(seed)
    return LearnedGate(facts(model, **more), torch.tensor(sample(model)))


def keeps(settings: TrainingSettings, path: Path, **more: Any) -> float:
    """Return the share of keys that a tiny model's gate keeps, trained so."""
    model = build("llama").requires_grad_(False)
    log = train(untrained(model, **more), task(model), settings, path / "checkpoint")
    assert log[0].keep > 0.9, "gates begin open"
    return min(log, key=lambda evaluation: evaluation.total).keep


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("kind", ["one-sided", "absolute", "square"])
def test_the_target_is_met(kind: Any, target: float, tmp_path: Path) -> None:
    settings = TrainingSettings(target, kind, strength=20, steps=150, rate=0.01, every=15, patience=9)
    kept = keeps(settings, tmp_path)
    assert kept <= target + 0.05
    if kind != "one-sided":
        assert kept >= target - 0.05


def test_a_bidirectional_gate_is_trained_on_prompts(tmp_path: Path) -> None:
    assert (
        abs(
            keeps(TrainingSettings(0.5, EvictionLoss.square, 20, 150, 0.01, 15, 9), tmp_path, form="bidirectional")
            - 0.5
        )
        <= 0.05
    )


class Stopped(Exception):
    """Interrupts a training in these tests."""


def stop_at(step: int) -> Callable[[int, Evaluation], None]:
    def progress(now: int, evaluation: Evaluation) -> None:
        if now == step:
            raise Stopped

    return progress


def corpus(folder: Path) -> Path:
    """Return a text of words that the tokenizer of `saved` knows."""
    path = folder / "words.txt"
    words = torch.randint(1, 64, (4000,), generator=torch.Generator().manual_seed(8)).tolist()
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


def learn(folder: Path, output: str, **more: Any) -> Trained:
    if not (folder / "model").exists():
        saved(folder / "model")
        corpus(folder)
    given = {"design": GateDesign(size=4), "settings": QUICK, "windows": TextWindows(16, 64), **more}
    return train_on_texts(ModelSource(str(folder / "model")), [folder / "words.txt"], folder / output, **given)


def test_the_same_seed_gives_the_same_gate(tmp_path: Path) -> None:
    one, same = learn(tmp_path, "one"), learn(tmp_path, "same")
    assert one.path.read_bytes() == same.path.read_bytes() and one.log == same.log
    assert learn(tmp_path, "other", seed=1).path.read_bytes() != one.path.read_bytes()


@pytest.mark.parametrize("interrupted", [6, 15, 23])
def test_a_training_that_goes_on_is_the_one_that_was_never_interrupted(interrupted: int, tmp_path: Path) -> None:
    whole = learn(tmp_path, "whole")
    with pytest.raises(Stopped):
        learn(tmp_path, "parts", progress_callback=stop_at(interrupted))
    assert not (tmp_path / "parts").exists() and (tmp_path / f"parts{CHECKPOINT}").is_file()
    steps: list[int] = []
    parts = learn(tmp_path, "parts", resume=True, progress_callback=lambda step, evaluation: steps.append(step))
    assert steps[0] == interrupted - interrupted % QUICK.every + 1, "it goes on, and does not start anew"
    assert parts.path.read_bytes() == whole.path.read_bytes() and parts.log == whole.log
    assert not (tmp_path / f"parts{CHECKPOINT}").exists()


def test_a_full_disk_at_the_end_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(tmp_path, "whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LearnedGate, "write", full)
        with pytest.raises(OSError, match="No space"):
            learn(tmp_path, "gate")
    assert learn(tmp_path, "gate", resume=True).path.read_bytes() == whole.path.read_bytes()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        learn(tmp_path, "gate", progress_callback=stop_at(7))
    for other in ({"settings": replace(QUICK, rate=0.1)}, {"design": GateDesign(size=8)}):
        with pytest.raises(UsageError, match="made with other settings"):
            learn(tmp_path, "gate", resume=True, **other)
    for data in ({"seed": 3}, {"windows": TextWindows(8, 64)}):
        with pytest.raises(UsageError, match="other training data or another seed"):
            learn(tmp_path, "gate", resume=True, **data)
    words = tmp_path / "words.txt"
    text = words.read_text()
    words.write_text(text + " w1")
    with pytest.raises(UsageError, match="other training data or another seed"):
        learn(tmp_path, "gate", resume=True)
    words.write_text(text)
    with pytest.raises(UsageError, match="no checkpoint"):
        learn(tmp_path, "elsewhere", resume=True)
    (tmp_path / f"gate{CHECKPOINT}").write_bytes(b"cut")
    with pytest.raises(ModelError, match="is damaged"):
        learn(tmp_path, "gate", resume=True)


class Script:
    """A task whose held-out losses are given, and which trains nothing."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = list(losses)

    def step(self, gate: LearnedGate, number: int) -> Any:
        bias = gate.layers[0].open.bias
        return bias.sum() * 0 + 1 + 0 * number, [bias[None, None] * 0 + 0.5]

    def held_out(self, gate: LearnedGate) -> Any:
        yield torch.tensor(self.losses.pop(0)), [torch.full((1, 2, 4), 0.5)]


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    settings = TrainingSettings(0.5, steps=100, every=2, patience=3)
    log = train(untrained(build("llama")), Script([9, 5, 4, 6, 4, 5, 0]), settings, tmp_path / "c")
    assert [evaluation.step for evaluation in log] == [0, 2, 4, 6, 8, 10]
    assert [evaluation.loss for evaluation in log] == [9, 5, 4, 6, 4, 5]


def test_the_best_gate_is_the_one_that_is_left(tmp_path: Path) -> None:
    class Moving(Script):
        def step(self, gate: LearnedGate, number: int) -> Any:
            bias = gate.layers[0].open.bias
            return bias.sum(), [bias[None, None] * 0 + 0.5]

    made, seen = untrained(build("llama")), {}
    train(
        made,
        Moving([9, 5, 4, 6, 7, 8]),
        TrainingSettings(0.5, steps=100, every=2, patience=3),
        tmp_path / "c",
        progress_callback=lambda step, evaluation: seen.setdefault(step, made.layers[0].open.bias.detach().clone()),
    )
    assert not torch.equal(seen[4], seen[10])
    assert torch.equal(made.layers[0].open.bias, seen[4])


def test_what_a_gate_was_trained_on_is_in_its_file(tmp_path: Path) -> None:
    made = learn(tmp_path, "gate")
    found = load_gate(str(made.path)).facts
    assert found == made.facts and found.model == str(tmp_path / "model")
    assert (found.layers, found.hidden, found.kv_heads, found.heads, found.size) == (2, 32, 2, 2, 4)
    about = found.provenance
    assert about["task"] == "reading"
    assert about["texts"][0]["file"] == "words.txt" and len(about["texts"][0]["sha256"]) == 64
    assert (about["target_keep"], about["eviction"], about["seed"]) == (0.4, "square", 0)
    assert about["keep"] == made.best.keep and about["best_step"] == made.best.step
    assert set(about["versions"]) == {"kvscope", "torch", "transformers"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_keep": 0}, "not a share"),
        ({"target_keep": 1.0}, "not a share"),
        ({"steps": 0}, "steps=0 is not above 0"),
        ({"rate": -1}, "rate=-1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainingSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"size": 0}, {"sinks": -1}, {"tau": 1.0}])
def test_designs_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        GateDesign(**wrong)


def test_texts_that_cannot_be_learned_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text has a window of 500 tokens"):
        learn(tmp_path, "gate", windows=TextWindows(500, 500))
    with pytest.raises(UsageError, match="make no sense"):
        TextWindows(16, 8)
    (tmp_path / "words.txt").unlink()
    with pytest.raises(UsageError, match="cannot read"):
        learn(tmp_path, "gate")


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    class Broken(Script):
        def step(self, gate: LearnedGate, number: int) -> Any:
            return gate.layers[0].open.bias.sum() * torch.nan, [torch.ones(1)]

    with pytest.raises(ModelError, match="loss of step 0 is not finite"):
        train(untrained(build("llama")), Broken([1.0]), TrainingSettings(), tmp_path / "c")
