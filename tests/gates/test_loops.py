"""Gates decide the same in the open loop, the closed loop, real decoding and training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_closed_loop, evaluate
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.gates import margins
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import VerifyJob
from kvscope.core.errors import TraceError, UsageError
from kvscope.core.options import ReplayOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.gates.module import load_gate
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.generate import trace
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.replay.run import replay
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.training.tasks import TextReading, Texts
from tests.closed_loop.test_closed_loop import Kept
from tests.gates.make import gate, written
from tests.model.tiny import build, saved, tokens
from tests.models.build import build as build_type

LENGTH, PROMPT = 26, 12
MODELS = ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "gpt2", "opt"]


def plan(name: str, decode: bool = True) -> EvictionPlan:
    return EvictionPlan.published(parse_policy(f"attention-gate:gate={name},decode={decode}"))


def passage() -> Passage:
    return Passage(TokenSequence(0, PROMPT, LENGTH), tokens(LENGTH)[0])


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(("form", "prefill"), [("causal", "full"), ("causal", "stream"), ("bidirectional", "full")])
@pytest.mark.parametrize("name", MODELS)
def test_the_closed_loop_is_real_decoding(name: str, form: str, prefill: Any, decode: bool, tmp_path: Path) -> None:
    model = build(name).double()
    (run,) = runs_of([plan(written(tmp_path, model, form=form, sinks=1), decode)], [], loop="closed")
    job = compile_closed_loop(model, [passage()], [run], [], prefill)
    (found,) = VerifyJob(job, attention_facts(model, passage().ids[None])).execute()
    assert found.decided and found.agrees, found
    assert found.largest_cache <= LENGTH


def test_the_gates_do_something(tmp_path: Path) -> None:
    model = build("llama").double()
    found = decode(model, passage().ids, plan(written(tmp_path, model)), 1, prompt=PROMPT, prefill="stream")
    kept = torch.stack(found.leave) > LENGTH  # [L, G, T]
    assert 0.2 < kept.float().mean() < 0.8
    assert len(set(kept.sum(-1).flatten().tolist())) > 1


@pytest.mark.parametrize(("form", "prefill"), [("causal", "stream"), ("causal", "full"), ("bidirectional", "full")])
def test_training_sees_what_the_closed_loop_does(form: str, prefill: Any, tmp_path: Path) -> None:
    """The loss that a gate is trained on is the loss that it has when it evicts."""
    model = build("llama").double().requires_grad_(False)
    name = written(tmp_path, model, form=form)
    text, sink = passage(), Kept()
    evaluate(model, [text], runs_of([plan(name, prefill == "stream")], [], loop="closed"), [], prefill, sink)
    ids = text.ids[None]
    texts = Texts(ids, torch.ones(ids.shape), PROMPT)
    loss, flags = TextReading(model, lambda _: texts, []).loss(load_gate(name), texts, prefill)
    gated = PROMPT if prefill == "full" else LENGTH - 1  # the last key has no later step to leave at
    for layer, own in enumerate(flags):
        kept = sink.intervals[0, layer].leave.reshape(2, LENGTH)[:, :gated] == LENGTH
        assert (own[0, :, :gated].numpy() == kept).all() and 0 < kept.sum() < kept.size
    losses = sink.losses[0]["nll_policy"]
    assert loss.item() == pytest.approx(losses[1 if prefill == "full" else 0 :].mean(), abs=1e-9)
    full = sink.losses[0]["nll_full"]
    assert np.abs(losses - full).max() > 1e-3, "or the gates did nothing"


def test_open_gates_lose_nothing(tmp_path: Path) -> None:
    model, sink = build("llama").double(), Kept()
    name = written(tmp_path, model, sinks=LENGTH)
    evaluate(model, [passage()], runs_of([plan(name)], [], loop="closed"), [], "stream", sink)
    assert np.abs(sink.losses[0]["nll_policy"] - sink.losses[0]["nll_full"]).max() < 1e-9


def test_heads_of_a_gate_are_those_that_the_model_attends_with(tmp_path: Path) -> None:
    """JetMoE repeats its 2 key/value heads to 4 before it attends, and 4 are recorded and trained on."""
    model, sink = build_type("jetmoe"), Kept()
    model.config.num_key_value_heads, named = 4, model.config.num_key_value_heads
    name = written(tmp_path, model)
    model.config.num_key_value_heads = named
    evaluate(model, [passage()], runs_of([plan(name)], [], loop="closed"), [], "stream", sink)
    assert {found.heads for found in sink.intervals.values()} == {4} and named == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """A trace of a tiny model with its layer inputs, and the folder of that model."""
    folder = tmp_path_factory.mktemp("recorded")
    saved(folder / "model")
    (folder / "prompt.txt").write_text(" ".join(f"w{1 + number % 60}" for number in range(PROMPT)))
    made = trace(
        str(folder / "model"),
        [folder / "prompt.txt"],
        output=folder / "t",
        max_new_tokens=9,
        hidden=True,
        query_block=5,
    )
    return folder, made


def test_a_trace_holds_what_the_layers_got(recorded: tuple[Path, Trace]) -> None:
    _, made = recorded
    model, calls = build("llama"), list[Call]()
    ids = torch.tensor(made.tokens(0)["token_id"])[None]
    with torch.no_grad(), observe_attention(model, calls.append):
        model(input_ids=ids, use_cache=False)
    for call in calls:
        assert call.hidden is not None
        assert np.abs(made.hidden(0, call.layer) - call.hidden[0].numpy()).max() < 1e-5
    assert "hidden" in made.stored and made.record.sizes["hidden/layer=001.parquet"] > 0


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_the_first_layer_decides_as_in_the_closed_loop(form: str, recorded: tuple[Path, Trace], tmp_path: Path) -> None:
    """The loops differ only by the evictions of earlier layers, and with full prefill not at all in the prompt."""
    folder, made = recorded
    policy = parse_policy(f"attention-gate:gate={written(folder, build('llama'), form=form)}")
    opened = replay(made, [policy], output=tmp_path / "open", closed=None).residency(0)
    sink = Kept()
    text = Passage(made.sequences[0], torch.tensor(made.tokens(0)["token_id"]))
    runs = runs_of([EvictionPlan.published(policy)], [], loop="closed")
    evaluate(build("llama"), [text], runs, [], "full", sink)
    for layer in range(2):
        own = opened[opened["layer"] == layer].sort_values(["kv_head", "key"])
        closed = sink.intervals[0, layer]
        leave = own["leave"].fillna(-1).to_numpy(np.int64)
        assert (leave == closed.stored_leave).all() and (leave >= 0).any() and (leave < 0).any()


def test_what_a_trace_gives_is_what_the_gate_says(recorded: tuple[Path, Trace]) -> None:
    from kvscope.engine.signals import load_signal

    folder, made = recorded
    name, model, calls = written(folder, build("llama"), tau=0.3), build("llama"), list[Call]()
    ids = torch.tensor(made.tokens(0)["token_id"])[None]
    with torch.no_grad(), observe_attention(model, calls.append):
        model(input_ids=ids, use_cache=False)
    expected = torch.stack([margins(name, call, call.hidden, PROMPT)[0] for call in calls])
    assert torch.allclose(load_signal(made, f"gate:{name}", 0, [0, 1]), expected, atol=1e-5)


def test_a_gate_of_another_model_is_refused(recorded: tuple[Path, Trace], tmp_path: Path) -> None:
    _, made = recorded
    other = written(tmp_path, build("qwen2"))
    with pytest.raises(UsageError, match="this model has other weights"):
        replay(made, [f"attention-gate:gate={other}"], output=tmp_path / "r")
    with pytest.raises(UsageError, match="gate demo is for demo: 4 layers"):
        replay(made, ["attention-gate"], output=tmp_path / "r")
    job = compile_replay(made, ["attention-gate", "h2o"], options=ReplayOptions(skip_unsupported=True))
    assert "gate demo is for demo" in job.skipped["attention-gate"]
    for work in (
        lambda: evaluate(build("llama"), [passage()], runs_of([plan(other)], [], loop="closed"), [], "full", Kept()),
        lambda: decode(build("llama"), passage().ids, plan(other), 1, prompt=PROMPT),
    ):
        with pytest.raises(UsageError, match="this model has other weights"):
            work()
    assert not (tmp_path / "r").exists()


def test_a_bidirectional_gate_is_refused_where_the_prompt_is_not_whole(
    recorded: tuple[Path, Trace], tmp_path: Path
) -> None:
    folder, made = recorded
    both = written(folder, build("llama"), form="bidirectional", sinks=0)
    for work in (
        lambda: replay(made, [f"attention-gate:gate={both}"], output=tmp_path / "r", prefill="stream"),
        lambda: decode(build("llama"), passage().ids, plan(both), 1, prompt=PROMPT, prefill="stream"),
    ):
        with pytest.raises(UsageError, match="looks at the whole prompt"):
            work()


def test_a_trace_without_layer_inputs_says_how_to_get_them(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    (tmp_path / "p.txt").write_text("w1 w2 w3")
    made = trace(str(tmp_path / "model"), [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=2)
    assert "hidden" not in made.stored and made.header.model.weights is None
    with pytest.raises(TraceError, match="attention-gate needs layer inputs") as found:
        replay(made, ["attention-gate"], output=tmp_path / "r")
    assert "--hidden" in found.value.todo


def test_layer_inputs_are_recorded_where_a_gate_lies_beside_the_model(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    gate(build("llama")).write(tmp_path / "model" / "gate.safetensors")
    (tmp_path / "p.txt").write_text("w1 w2 w3")
    for asked, expected in ((None, True), (False, False)):
        made = trace(
            str(tmp_path / "model"), [tmp_path / "p.txt"], output=tmp_path / f"t{asked}", max_new_tokens=2, hidden=asked
        )
        assert ("hidden" in made.stored) == expected
