"""The closed loop compared with plain passes of the model: with masks written by hand, and without eviction."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from numpy.typing import NDArray

from kvscope.closed_loop.compile import evaluate
from kvscope.closed_loop.feasible import require_closed
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.self_check import self_check
from kvscope.core.budget import Budget
from kvscope.core.errors import ReplayError, UsageError
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.metrics import METRICS
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.model.tiny import MODELS, build, tokens

LENGTH, PROMPT = 40, 16
ROTARY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox"]


class Kept:
    """A sink that stores what it receives."""

    def __init__(self) -> None:
        self.losses: dict[int, Mapping[str, NDArray[Any]]] = {}
        self.intervals: dict[tuple[int, int], ResidencyIntervals] = {}
        self.fidelities: dict[tuple[int, int], Mapping[str, NDArray[Any]]] = {}

    def residency(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        self.intervals[run, layer] = intervals

    def fidelity(self, run: int, sequence: int, layer: int, steps: NDArray[Any], values: Mapping[str, Any]) -> None:
        self.fidelities[run, layer] = values

    def tokens(self, run: int, sequence: int, position: NDArray[Any], values: Mapping[str, NDArray[Any]]) -> None:
        self.losses[run] = values


def passage(length: int = LENGTH, prompt: int = PROMPT) -> Passage:
    return Passage(TokenSequence(0, prompt, length), tokens(length)[0])


def runs(*specs: tuple[str, str], **more: Any) -> list[RunSpec]:
    return [
        RunSpec(number, EvictionPlan.published(parse_policy(spec)), Budget.parse(budget), "closed", **more)
        for number, (spec, budget) in enumerate(specs)
    ]


def losses(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the losses of all tokens but the first, from a plain pass with a mask ``[T, T]``."""
    with torch.inference_mode():
        given = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(model.dtype)[None, None]
        logits = model(input_ids=ids[None], attention_mask=given, use_cache=False).logits[0]
    return -torch.log_softmax(logits[:-1], -1).gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt_oss"])
def test_a_cache_without_eviction_gives_the_losses_of_the_model(name: str, prefill: str) -> None:
    model, text, sink = build(name).double(), passage(), Kept()
    evaluate(model, [text], runs(("h2o", str(LENGTH)), ("full", "1")), [], prefill, sink)
    first = PROMPT if prefill == "full" else 1
    expected = losses(model, text.ids)[first - 1 :].numpy()
    near = 1e-6 if name == "gemma2" else 1e-10  # its own attention, with soft cap, computes the softmax in float32
    for values in sink.losses.values():
        assert np.abs(values["nll_full"] - expected).max() < 1e-12
        assert np.abs(values["nll_policy"] - expected).max() < near
        assert values["kl"].max() < 1e-12 and values["top1_equal"].all()


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_tokens_before_the_text_are_not_scored(prefill: str) -> None:
    prefix = PROMPT + 2 if prefill == "full" else 2
    model, sink = build("llama").double(), Kept()
    text = replace(passage(), prefix=prefix)
    evaluate(model, [text], runs(("tova", "6")), [], prefill, sink)
    expected = losses(model, text.ids)[prefix - 1 :].numpy()
    assert np.abs(sink.losses[0]["nll_full"] - expected).max() < 1e-12


def test_learned_sinks_without_eviction() -> None:
    model, text, sink = build("gpt_oss"), passage(), Kept()
    evaluate(model, [text], runs(("tova", str(LENGTH)), ("tova", "6")), [], "stream", sink)
    expected = losses(model, text.ids).numpy()
    assert np.abs(sink.losses[0]["nll_policy"] - expected).max() < 1e-4
    assert np.abs(sink.losses[1]["nll_policy"] - expected).max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "phi3", "gpt2"])
def test_a_window_is_a_band_of_the_models_own_mask(name: str) -> None:
    budget = 7
    model, sink = build(name).double(), Kept()
    step, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    for prefill, prompt in (("stream", 1), ("full", PROMPT)):
        text = passage(prompt=prompt)
        evaluate(
            model, [text], runs(("window", str(budget)), ("streaming-llm:sinks=2", str(budget))), [], prefill, sink
        )
        past = key <= step
        in_prompt = step < prompt
        window = past & ((key >= step - budget) | in_prompt)
        streaming = past & ((key >= step - (budget - 2)) | (key < 2) | in_prompt)
        for number, mask in enumerate((window, streaming)):
            expected = losses(model, text.ids, mask)[max(prompt, 1) - 1 :].numpy()
            assert np.abs(sink.losses[number]["nll_policy"] - expected).max() < 1e-10


@pytest.mark.parametrize("name", ROTARY)
def test_compacted_positions_of_a_whole_cache_are_the_original_ones(name: str) -> None:
    model, text, sink = build(name).double(), passage(), Kept()
    chosen = runs(("tova", str(LENGTH)), ("h2o", "4"), positions="compacted")
    evaluate(model, [text], chosen, [], "stream", sink)
    expected = losses(model, text.ids).numpy()
    assert np.abs(sink.losses[0]["nll_policy"] - expected).max() < 1e-5  # cosines are float32 in every model
    assert np.abs(sink.losses[1]["nll_policy"] - expected).max() > 1e-3


def test_a_compacted_window_is_the_text_cut_off() -> None:
    """In a one-layer model a query sees the same as if the text began with its window."""
    budget = 6
    model, text, sink = build("llama").double(), passage(), Kept()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    evaluate(model, [text], runs(("window", str(budget)), positions="compacted"), [], "stream", sink)
    for t in range(budget, LENGTH - 1):
        own = losses(model, text.ids[t - budget : t + 2])[-1].item()
        assert abs(sink.losses[0]["nll_policy"][t] - own) < 1e-5


def test_positions_that_cannot_be_compacted() -> None:
    with pytest.raises(UsageError, match="holds every key"):
        require_closed(EvictionPlan.published(parse_policy("quest")), "compacted")
    with pytest.raises(Exception, match="no rotary embedding"):
        evaluate(build("gpt2"), [passage()], runs(("tova", "6"), positions="compacted"), [], "stream", Kept())


def test_the_order_of_runs_does_not_matter() -> None:
    model, text = build("llama").double(), passage()
    specs = [
        ("h2o", "8"),
        ("tova", "8"),
        ("h2o", "20%"),
        ("snapkv:window=4", "8"),
        ("ada-kv:window=4", "10"),
        ("cake", "9"),
    ]
    together = Kept()
    metrics = [METRICS.get(name) for name in METRICS.names()]
    evaluate(model, [text], runs(*specs), metrics, "full", together)
    for number, spec in enumerate(specs):
        alone = Kept()
        evaluate(model, [text], runs(spec), metrics, "full", alone)
        for name, values in alone.losses[0].items():
            assert np.abs(values.astype(float) - together.losses[number][name].astype(float)).max() < 1e-9
        for layer in range(2):
            one, other = alone.intervals[0, layer], together.intervals[number, layer]
            for name in ("kv_head", "key", "enter", "leave"):
                assert (getattr(one, name) == getattr(other, name)).all()
            for name, value in alone.fidelities[0, layer].items():
                np.testing.assert_allclose(value, together.fidelities[number, layer][name], atol=1e-6)


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, positions: str) -> None:
    model, text = build("gemma3").double(), passage()
    chosen = runs(("h2o", "8"), ("tova", "6"), positions=positions)
    metrics = [METRICS.get("retained_mass"), METRICS.get("ideal_cosine")]
    whole, parts = Kept(), Kept()
    evaluate(model, [text], chosen, metrics, "stream", whole)
    monkeypatch.setattr("kvscope.closed_loop.forward.BLOCK_QUERIES", 7)
    evaluate(model, [text], chosen, metrics, "stream", parts)
    for number in range(2):
        np.testing.assert_allclose(whole.losses[number]["nll_policy"], parts.losses[number]["nll_policy"], atol=1e-12)
        for layer in range(2):
            assert (whole.intervals[number, layer].leave == parts.intervals[number, layer].leave).all()
            for name, value in whole.fidelities[number, layer].items():
                np.testing.assert_allclose(value, parts.fidelities[number, layer][name], atol=1e-6)


def test_the_first_layer_is_that_of_the_open_loop() -> None:
    """Its input does not depend on evictions, so its decisions and metrics are those of the open loop."""
    from kvscope.model.attention_hook import Call, observe_attention
    from tests.engine.maps import run as open_run

    model, text, sink = build("llama").double(), passage(), Kept()
    calls: list[Call] = []
    with torch.inference_mode(), observe_attention(model, calls.append):
        model(input_ids=text.ids[None], use_cache=False)
    rows = calls[0].rows(0, LENGTH)
    evaluate(model, [text], runs(("a2sf", "8")), [], "full", sink)
    simulation = open_run(parse_policy("a2sf"), rows, [8], kv_heads=2, prompt=PROMPT, prefill="full")
    intervals = simulation.residency(0, 0)
    assert (sink.intervals[0, 0].leave == intervals.leave).all()


class LooksBack(Policy):
    """Needs rows over evicted keys."""

    name = "looks-back"
    needs = frozenset({"weights", "full_weights"})


def test_policies_without_a_closed_loop() -> None:
    with pytest.raises(UsageError, match="keys that it has evicted"):
        require_closed(EvictionPlan.published(LooksBack()))


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_layers_on_several_devices(positions: str, tmp_path: Path) -> None:
    """One layer is offloaded to disk, in place of another device; accelerate's hooks load it."""
    together, apart, model = Kept(), Kept(), build("llama").double()
    chosen = runs(("h2o", "8"), ("cake", "8"), ("tova", "6"), positions=positions)
    evaluate(model, [passage()], chosen, [], "full", together)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offload")
    assert {weight.device.type for weight in model.parameters()} == {"cpu", "meta"}
    evaluate(model, [passage()], chosen, [], "full", apart)
    for run, values in together.losses.items():
        assert np.array_equal(values["nll_policy"], apart.losses[run]["nll_policy"])
        assert not np.array_equal(values["nll_policy"], values["nll_full"])


def test_the_self_check_finds_missing_attention_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without attention has nothing to evict, but not one that caches keys and attends to them by itself."""
    model = build("llama")
    assert self_check(model, tokens(20)[0], "full") == [0, 1]

    def alone(hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        if past_key_values is not None and keeps:
            past_key_values.update(*torch.zeros(2, 1, 2, hidden_states.shape[1], 8), 1)
        return hidden_states, None

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", alone)
    keeps = False
    assert self_check(model, tokens(20)[0], "full") == [0]
    keeps = True
    with pytest.raises(Exception, match="layer 1 of LlamaForCausalLM caches keys, but its attention cannot be"):
        self_check(model, tokens(20)[0], "full")


def test_losses_that_differ_from_the_recorded_ones_are_an_error() -> None:
    model, text = build("llama"), passage()
    wrong = Passage(text.sequence, text.ids, np.full(LENGTH, -0.5))
    with pytest.raises(Exception, match="losses differ from those in the trace"):
        evaluate(model, [wrong], runs(("tova", "6")), [], "full", Kept())


def test_losses_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ReplayError):
        evaluate(model, [passage()], runs(("tova", "6")), [], "full", Kept())


def test_many_runs_are_split_where_logits_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = build("llama").double(), passage()
    whole = Kept()
    chosen = runs(("h2o", "8"), ("tova", "8"), ("h2o", "6"))
    evaluate(model, [text], chosen, [], "full", whole)
    monkeypatch.setattr("kvscope.closed_loop.job.PASS_BYTES", 1)
    parts, seen = Kept(), []
    evaluate(model, [text], chosen, [], "full", parts, progress=seen.append)
    assert seen == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 2, 2 / 3, 2 / 3, 5 / 6, 1, 1])  # two layers, then the pass
    for number in range(3):
        np.testing.assert_allclose(whole.losses[number]["nll_policy"], parts.losses[number]["nll_policy"], atol=1e-10)


def test_progress_is_told_after_every_layer() -> None:
    """One text and few runs are one pass: its layers are all that there is to tell."""
    told: list[float] = []
    model = build("llama")
    evaluate(model, [passage()], runs(("h2o", "9"), ("tova", "9")), [], "full", Kept(), progress=told.append)
    parts = 2 * model.config.num_hidden_layers
    assert told == pytest.approx([*(number / parts for number in range(1, parts + 1)), 1])
