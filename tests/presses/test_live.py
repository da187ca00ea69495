"""What a replay retains under a press of kvpress, and what kvpress's own live run retains in the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import kvscope
from kvscope.policies.press import parse_press
from kvscope.presses.build import kvpress
from kvscope.presses.choose import chosen_by, ratio_of
from kvscope.presses.support import SUPPORTED
from kvscope.results.store import Replay
from tests.model.tiny import build as tiny
from tests.model.tiny import tokens
from tests.presses.live import DEMO, OWN_SIZE, RATIOS, SIZED, live, model_of, needs_kvpress, press_of

pytestmark = needs_kvpress


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> kvscope.Trace:
    folder = tmp_path_factory.mktemp("traces")
    prompt = folder / "prompt.txt"
    prompt.write_text((DEMO / "prompt.txt").read_text()[:450])
    return kvscope.trace("demo", [prompt], output=folder / "t", max_new_tokens=4, dtype="float32")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kernel: model_of(kernel) for kernel in ("sdpa", "eager")}


def prompt_of(trace: kvscope.Trace) -> Tensor:
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))
    return ids[: trace.sequences[0].prompt]


def retained(done: Replay, run: int, layer: int, prompt: int) -> NDArray[np.bool_]:
    """Return bool ``[G, P]``: the keys of the prompt that a run holds after it, and until the end."""
    held = done.resident(run, 0, layer)
    assert (held[:, -1, :prompt] == held[:, prompt - 1, :prompt]).all(), "nothing is evicted after the prompt"
    assert held[:, -1, prompt:].all(), "keys after the prompt are retained"
    return held[:, prompt - 1, :prompt]


def compare(
    done: Replay, run: int, trace: kvscope.Trace, models: dict[str, Any], press: Any, what: object
) -> list[int]:
    """Compare a run of a replay with the live run of a press; return how many keys each head retains."""
    ids, sizes = prompt_of(trace), []
    model = models["eager" if "ObservedAttention" in type(press).__name__ else "sdpa"]
    for layer, kept in enumerate(live(model, ids, press)[0]):
        assert (retained(done, run, layer, len(ids)) == kept.numpy()).all(), (what, layer)
        sizes += kept.sum(-1).tolist()
    return sizes


def test_presses_at_their_own_ratios(trace: kvscope.Trace, models: dict[str, Any], tmp_path: Path) -> None:
    """Each press with a ratio, at 0.5 and 0.8, as ``kvpress:NAME(compression_ratio=...)``: the keys of the live run."""
    specs = {
        (name, ratio): f"kvpress:{parse_press(SUPPORTED[name].example).at_ratio(ratio)}"
        for name in SIZED
        for ratio in RATIOS
    }
    assert len(SIZED) >= 20
    done = kvscope.replay(trace, list(specs.values()), output=tmp_path / "r", metrics=["held_keys"])
    assert len(done.info.runs) == len(specs) and not any(run.bounded for run in done.info.runs)
    for run, (name, ratio) in zip(done.info.runs, specs, strict=True):
        sizes = compare(done, run.run, trace, models, press_of(name, ratio), (name, ratio))
        assert sum(sizes) < len(sizes) * len(prompt_of(trace)), f"{name} evicts something"


def test_a_budget_is_the_number_of_keys_that_a_ratio_retains(
    trace: kvscope.Trace, models: dict[str, Any], tmp_path: Path
) -> None:
    """With ``--budget`` each press gets the ratio at which kvpress retains as many keys, and retains those."""
    prompt = len(prompt_of(trace))
    budgets = [int(prompt * (1 - ratio)) for ratio in RATIOS]
    specs = [f"kvpress:{SUPPORTED[name].example}" for name in SIZED]
    done = kvscope.replay(trace, specs, budgets, output=tmp_path / "r", metrics=["held_keys"])
    pairs = [(name, budget) for name in SIZED for budget in budgets]
    for run, (name, budget) in zip(done.info.runs, pairs, strict=True):
        assert run.budget_keys == (budget,)
        sizes = compare(done, run.run, trace, models, press_of(name, ratio_of(budget, prompt)), (name, budget))
        if SUPPORTED[name].budget == "keys of each key/value head":
            assert set(sizes) == {budget}, f"{name} retains what a ratio of {RATIOS} retains"


@pytest.mark.parametrize("name", OWN_SIZE)
def test_presses_that_state_their_own_size(
    trace: kvscope.Trace, models: dict[str, Any], tmp_path: Path, name: str
) -> None:
    done = kvscope.replay(trace, [f"kvpress:{SUPPORTED[name].example}"], output=tmp_path / "r", metrics=["held_keys"])
    sizes = compare(done, 0, trace, models, press_of(name), name)
    assert 0 < sum(sizes) < len(sizes) * len(prompt_of(trace))
    assert done.info.runs[0].budget is None


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize(
    "text",
    [
        "SnapKVPress(window_size=4)",
        "TOVAPress()",
        "ExpectedAttentionPress(n_future_positions=16)",
        "KeyDiffPress()",
        "CompactorPress(sink_size_start=2, chunk_size=8)",
        "AdaKVPress(press=KnormPress())",
        "CriticalKVPress(press=TOVAPress())",
    ],
)
def test_other_models(kind: str, text: str) -> None:
    """Random models of other types: those that kvpress names as supported, without a sliding window."""
    model, ids = tiny(kind), tokens(40)[0]
    if text.startswith("CriticalKVPress") and not hasattr(model.config, "head_dim"):
        pytest.skip(f"kvpress reads config.head_dim, which {kind} lacks")
    for ratio in RATIOS:
        press = eval(text, dict(vars(kvpress())))
        press.compression_ratio = ratio
        kept = chosen_by(model, ids, parse_press(text).at_ratio(ratio), None).kept
        for layer, expected in enumerate(live(model, ids, press)[0]):
            assert torch.equal(kept[layer], expected), (ratio, layer)


def test_each_sequence_has_its_own_choice(models: dict[str, Any], tmp_path: Path) -> None:
    text, prompts = (DEMO / "prompt.txt").read_text(), [tmp_path / "a.txt", tmp_path / "b.txt"]
    for prompt, part in zip(prompts, (text[:150], text[150:400]), strict=True):
        prompt.write_text(part)
    trace = kvscope.trace("demo", prompts, output=tmp_path / "t", max_new_tokens=3, dtype="float32")
    done = kvscope.replay(trace, ["kvpress:KeyDiffPress(compression_ratio=0.5)"], output=tmp_path / "r")
    for sequence in trace.sequences:
        ids = torch.from_numpy(trace.tokens(sequence.index)["token_id"].to_numpy().astype("int64"))[: sequence.prompt]
        for layer, kept in enumerate(live(models["sdpa"], ids, press_of("KeyDiffPress", 0.5))[0]):
            held = done.resident(0, sequence.index, layer)[:, sequence.prompt - 1, : sequence.prompt]
            assert (held == kept.numpy()).all(), (sequence.index, layer)
