"""Presses in the closed loop: losses of real decoding with kvpress's shortened cache, and nothing left behind."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvscope
from kvscope.closed_loop.compile import compile_closed_loop, compile_perplexity, compile_verify
from kvscope.closed_loop.job import ForwardPass
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import ModelError
from kvscope.core.options import (
    ClosedLoopOptions,
    GenerateOptions,
    Loop,
    ModelSource,
    OutputOptions,
    PerplexityOptions,
    Prefill,
)
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.model.foreign_hooks import attention_functions_as_before
from kvscope.policies.press import parse_press
from kvscope.policies.spec import parse_policy
from kvscope.presses.build import kvpress
from kvscope.presses.choose import chosen_by
from kvscope.trace.reader import TokenSequence
from tests.presses.live import DEMO, live, model_of, needs_kvpress

pytestmark = needs_kvpress
RATIO = 0.8
TEXT = (DEMO / "prompt.txt").read_text()
DECODED = [  # caches that are shorter, then caches of which some keys are hidden while tokens are generated
    "SnapKVPress(window_size=8)",
    "ExpectedAttentionPress(n_future_positions=64)",
    "KeyDiffPress()",
    "ChunkKVPress(press=TOVAPress())",
    "AdaKVPress(press=SnapKVPress(window_size=8))",
    "CriticalAdaKVPress(press=KnormPress())",
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> kvscope.Trace:
    return traced(tmp_path_factory.mktemp("traces"), "t")


def traced(folder: Path, name: str) -> kvscope.Trace:
    prompt = folder / "prompt.txt"
    prompt.write_text(TEXT[:450])
    return kvscope.trace(
        "demo", [prompt], output=folder / name, max_new_tokens=12, dtype="float64", store="maps+vectors"
    )


@contextmanager
def patched() -> Iterator[None]:
    """Put kvpress's own attention functions in place, which hide keys from some heads while tokens are generated."""
    kvpress()
    from kvpress.attention_patch import patch_attention_functions

    with attention_functions_as_before():
        patch_attention_functions()
        yield


@torch.no_grad()
def decoded(model: Any, ids: Tensor, prompt: int, press: Any) -> Tensor:
    """Return the logits ``[S, V]`` before each token after the prompt, decoded with the cache that a press leaves."""
    with patched():
        logits = [model(ids[None, :prompt]).logits[0, -1:]]  # the prompt is read with the full cache
        _, cache = live(model, ids[:prompt], press)
        for t in range(prompt, len(ids) - 1):
            where = torch.tensor([t])
            step = model(ids[None, t : t + 1], past_key_values=cache, position_ids=where[None], cache_position=where)
            logits.append(step.logits[0])
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return torch.cat(logits)


def test_losses_are_those_of_decoding_with_the_cache_that_kvpress_leaves() -> None:
    model, ids = model_of(dtype=torch.float64), tokenized()
    prompt = len(ids) - 16
    passage = Passage(TokenSequence(0, prompt, len(ids), True), ids)
    plans = [EvictionPlan.published(parse_policy(f"kvpress:{parse_press(text).at_ratio(RATIO)}")) for text in DECODED]
    runs = runs_of(plans, [], Loop.closed)
    with torch.inference_mode():
        job = compile_closed_loop(model, [passage], runs, [], Prefill.full)
        full, *evicting = ForwardPass(job, passage, job.runs).logits()
    for logits, text in zip(evicting, DECODED, strict=True):
        expected = decoded(model, ids, prompt, press_at(text))
        perplexities = [perplexity(rows, ids[prompt:]) for rows in (logits, expected, full)]
        assert abs(perplexities[0] - perplexities[1]) < 1e-9, text
        assert abs(perplexities[0] - perplexities[2]) > 1e-3, f"{text} changes the perplexity"
        assert (logits - expected).abs().max() < 1e-9, text


def test_both_loops_hold_the_same_keys(trace: kvscope.Trace, tmp_path: Path) -> None:
    specs = [f"kvpress:{text}" for text in DECODED]
    closed = ClosedLoopOptions(dtype="float64")
    done = kvscope.replay(trace, specs, "20%", output=tmp_path / "r", metrics=["held_keys"], closed=closed)
    runs = [run for run in done.info.runs if run.loop == "closed"]
    assert len(runs) == len(DECODED)
    for run in runs:
        for layer in trace.layers:
            assert (done.resident(run.run, 0, layer) == done.resident(run.open_run, 0, layer)).all(), run.label


def perplexity(logits: Tensor, targets: Tensor) -> float:
    return math.exp(float(torch.nn.functional.cross_entropy(logits, targets)))


def press_at(text: str) -> Any:
    """Return the press that a text writes, at `RATIO`."""
    made = eval(text, dict(vars(kvpress())))
    made.compression_ratio = RATIO
    return made


def tokenized() -> Tensor:
    ids = AutoTokenizer.from_pretrained(DEMO)(TEXT[:500])["input_ids"]
    return torch.tensor(ids)


def test_a_press_is_verified_and_decoded_as_other_policies(trace: kvscope.Trace) -> None:
    specs = [f"kvpress:{text}" for text in list(DECODED)[:2]] + ["kvpress:AdaKVPress(press=SnapKVPress(window_size=8))"]
    verdicts = compile_verify(trace, specs, "20%").execute()
    assert len(verdicts) == 3
    assert all(verdict.agrees and verdict.decided for verdict in verdicts), verdicts


def test_perplexity_with_a_prompt(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:900])
    options = PerplexityOptions(window=128, prompt=64)
    job = compile_perplexity(ModelSource("demo"), [text], ["kvpress:KnormPress()", "key-norm"], "25%", options)
    done = job.execute(OutputOptions(tmp_path / "r"))
    held = done.fidelity(0)["held_keys"]
    assert len(done.tokens(0)) == len(done.tokens(1)) > 64
    assert held.min() >= 16 and done.info.runs[0].budget_keys[0] == 16


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every Parquet file of a folder."""
    files = sorted(folder.rglob("*.parquet"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_press_leaves_nothing_behind(tmp_path: Path) -> None:
    """Traces and closed loops are the same bytes before and after a press was run, in one process."""

    def work(name: str) -> dict[str, str]:
        made = traced(tmp_path, name)
        closed = ClosedLoopOptions(dtype="float64")
        kvscope.replay(made, ["snapkv:window=8", "h2o", "random"], output=tmp_path / f"{name}-r", closed=closed)
        return digest(made.path) | digest(tmp_path / f"{name}-r")

    before, functions = work("before"), dict(ALL_ATTENTION_FUNCTIONS)
    assert len(before) > 8
    specs = [f"kvpress:{text}" for text in (*DECODED, "RandomPress()", "ObservedAttentionPress()")]
    kvscope.replay(kvscope.open(tmp_path / "before"), specs, output=tmp_path / "r", metrics=["held_keys"])
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert work("after") == before


@pytest.mark.parametrize("text", ["AdaKVPress(press=KnormPress())", "ObservedAttentionPress()", "RandomPress()"])
def test_the_model_is_as_before(text: str) -> None:
    model, ids = model_of(), torch.arange(3, 40)
    names = [name for name, _ in model.named_modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    chosen = chosen_by(model, ids, parse_press(text), 9)
    assert all(kept.sum() == 9 * len(kept) for kept in chosen.kept.values())
    assert [name for name, _ in model.named_modules()] == names
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)
    assert (model(ids[None]).logits[0, -1] - chosen.logits).abs().max() < 1e-4


def test_another_model_than_that_of_the_trace_is_noticed(trace: kvscope.Trace, tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(tmp_path / "other")
    closed = ClosedLoopOptions(model=str(tmp_path / "other"))
    with pytest.raises(ModelError, match="the model's loss after the prompt differs from that in the trace"):
        kvscope.replay(trace, ["kvpress:KnormPress()"], output=tmp_path / "r", closed=closed)


def test_generated_answers(tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    prompt = TEXT[:450]
    examples.write_text(json.dumps({"prompt": prompt, "answer": "x"}) + "\n")
    trace = kvscope.trace("demo", [examples], output=tmp_path / "t", max_new_tokens=3)
    done = kvscope.replay(
        trace,
        ["kvpress:SnapKVPress(window_size=8)", "full"],
        "50%",
        output=tmp_path / "r",
        closed=ClosedLoopOptions(),
        generate=GenerateOptions(),
    )
    assert len(done.answers()) == 2
