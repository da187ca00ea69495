"""KVzap against its plain-loop reference and kvpress's scores and decisions, and scorers trained on a trace."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.core.gate_options import ScorerSettings
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.runs import runs_of
from kvscope.gates.scorers import KeyScorers, LayerScorer, ScorerFacts, load_scorers
from kvscope.model.generate import trace
from kvscope.model.sample import sample
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import TokenSequence, Trace, open_trace
from kvscope.training.scorers import pair, spearman, train_scorers
from tests.engine.maps import attention, run, signals
from tests.model.tiny import build, saved, tokens
from tests.policies.decisions import HEADS, LENGTH, head_sets
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.test_authors_decisions import waves
from tests.policies.vectors import sets, simulated
from tests.reference.policies.kvzap import below, predicted
from tests.reference.policies.loop import evict

CASES = json.loads((Path(__file__).parents[1] / "data" / "kvzap_decisions.json").read_text())["cases"]
EXAMPLE = Path(__file__).parents[2] / "traces" / "example"


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(("window", "threshold"), [(0, 0.0), (1, -0.3), (6, 0.2), (LENGTH, 1.0)])
def test_below_the_threshold_as_in_the_plain_loop(prefill: str, window: int, threshold: float) -> None:
    plan = EvictionPlan.published(parse_policy(f"kvzap:window={window},threshold={threshold}"))
    for seed, ((heads, groups), prompt) in enumerate(product(HEADS, [1, 9, LENGTH - 1])):
        given = signals(plan, 2, heads, groups, LENGTH, seed)
        rows = attention(seed, 2, heads, LENGTH)
        simulation = run(plan, rows, [LENGTH], kv_heads=groups, prompt=prompt, prefill=prefill, given=given)
        for layer, head in product(range(2), range(groups)):
            scores = given["scorer:demo"][layer, head].tolist()
            assert head_sets(simulation, layer, head) == below(scores, threshold, prompt, prefill, window)


@pytest.mark.parametrize(("prefill", "phase"), list(product(["full", "stream"], ["step", "every:5"])))
def test_under_a_budget_as_in_the_plain_loop(prefill: str, phase: str) -> None:
    shape, budgets = Shape((0, 1), 4, 2, 17, 30), [5, 9, 30]
    scores = torch.randn(2, 2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = EvictionPlan(parse_policy("kvzap:window=3"), phase, "uniform")
    simulation, _ = simulated(plan, budgets, shape, prefill, {"scorer:demo": scores})
    held = simulation.held(0, 30)
    for (number, budget), layer, head in product(enumerate(budgets), range(2), range(2)):
        own = scores[layer, head].tolist()
        expected = evict(
            30,
            budget,
            lambda t: plan.compresses(t, 17, prefill),
            lambda t, visible, own=own: [own[key] if key in visible else 0.0 for key in range(t + 1)],
            recent=min(3, budget // 2),
        )
        assert sets(held[number, layer, head]) == expected


def of_waves(case: dict[str, Any]) -> LayerScorer:
    """Return the scorer that kvpress was given."""
    scorer, phase, width = LayerScorer(24, 2, case["width"]).double(), case["phase"], case["width"]
    with torch.no_grad():
        if scorer.inner is not None:
            scorer.inner.weight.copy_(waves(1, phase + 1, width, 24)[0])
            scorer.inner.bias.copy_(waves(1, phase + 2, 1, width)[0, 0])
        scorer.outer.weight.copy_(waves(1, phase + 3, 2, width or 24)[0])
        scorer.outer.bias.copy_(waves(1, phase + 4, 1, 2)[0, 0])
    return scorer


@pytest.mark.parametrize("case", CASES, ids=[f"{case['phase']} {case['width']}" for case in CASES])
def test_scores_and_decisions_are_those_of_kvpress(case: dict[str, Any]) -> None:
    scorer, hidden = of_waves(case), waves(1, case["phase"], 60, 24)[0]
    scores = scorer(hidden).T.detach()
    assert torch.allclose(scores, torch.tensor(case["scores"], dtype=torch.float64), atol=1e-8)
    layers = [(part.weight.tolist(), part.bias.tolist()) for part in (scorer.inner, scorer.outer) if part is not None]
    for t in range(0, 60, 13):
        expected = predicted(hidden[t].tolist(), layers[0] if len(layers) == 2 else None, layers[-1])
        assert scores[:, t].tolist() == pytest.approx(expected, abs=1e-9)
    runs = [("kvzap:window=0", int(budget), kept) for budget, kept in case["kept"].items()]
    runs += [(f"kvzap:window=10,threshold={least}", 60, kept) for least, kept in case["below"].items()]
    for spec, budget, kept in runs:
        given = {"scorer:demo": scores[None]}
        simulation, _ = simulated(parse_policy(spec), [budget], Shape((0,), 2, 2, 60, 60), "full", given)
        held = simulation.held(59, 60)[0, 0, :, 0]
        assert [head.nonzero().flatten().tolist() for head in held] == kept


def written(folder: Path, model: Any, width: int = 4) -> str:
    """Return the path of a file with random scorers of a model."""
    config = model.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads, width)
    torch.manual_seed(0)
    KeyScorers(ScorerFacts("tiny", *sizes, sample(model))).write(folder / f"s{width}.safetensors")
    return str(folder / f"s{width}.safetensors")


@pytest.mark.parametrize("width", [0, 4])
def test_both_loops_evict_the_same_keys_and_decoding_too(width: int, tmp_path: Path) -> None:
    name = written(tmp_path, build("llama"), width)
    made = recorded(tmp_path, hidden=True)
    opened, decoded = evicted_in_both(made, f"kvzap:scorers={name},window=2", tmp_path)
    assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()
    model, ids = build("llama").double(), tokens(26)
    plans = [
        EvictionPlan.published(parse_policy(f"kvzap:scorers={name},window=2{more}")) for more in ("", ",threshold=0")
    ]
    passage = Passage(TokenSequence(0, 12, 26), ids[0])
    for plan, prefill in product(plans, (Prefill.full, Prefill.stream)):
        (one,) = runs_of([plan], parse_budgets("7"), loop="closed")
        job = compile_closed_loop(model, [passage], [one], [], prefill)
        (found,) = VerifyJob(job, attention_facts(model, ids)).execute()
        assert found.decided and found.agrees, found


@pytest.fixture(scope="module")
def read_again(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Six prompts of a tiny model with layer inputs, each read again."""
    folder = tmp_path_factory.mktemp("traces")
    saved(folder / "model")
    for seed in range(6):
        (folder / f"{seed}.txt").write_text(" ".join(f"w{(seed * 11 + word * 7) % 60 + 1}" for word in range(20)))
    files = [folder / f"{seed}.txt" for seed in range(6)]
    return trace(str(folder / "model"), files, output=folder / "t", max_new_tokens=2, hidden=True, reread=True)


def test_a_linear_scorer_solves_ridge_regression(read_again: Trace, tmp_path: Path) -> None:
    made = train_scorers([read_again], tmp_path / "s", ScorerSettings(width=0))
    for layer, scorer in enumerate(made.scorers.layers):
        assert isinstance(scorer, LayerScorer)
        parts = [pair(read_again, sequence, layer) for sequence in (0, 2, 3, 4, 5)]  # every fifth is held out
        inputs, target = (torch.cat([part[axis] for part in parts]).double() for axis in (0, 1))
        weight, bias = (part.detach().double().requires_grad_() for part in (scorer.outer.weight, scorer.outer.bias))
        loss = (inputs @ weight.T + bias - target).square().sum() + weight.square().sum()
        loss.backward()
        assert weight.grad is not None and bias.grad is not None
        assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3
    again = load_scorers(str(tmp_path / "s"))
    assert again.facts == made.scorers.facts and again.facts.provenance["prompts"] == 6
    hidden = torch.from_numpy(read_again.hidden(0, 1))
    assert torch.allclose(again.scores(1, hidden), made.scorers.scores(1, hidden), atol=0.02)


def test_training_lowers_the_error_and_is_repeatable(read_again: Trace, tmp_path: Path) -> None:
    few, many, same = (
        train_scorers([read_again], tmp_path / f"{n}", ScorerSettings(width=8, epochs=epochs, batch=20))
        for n, epochs in enumerate((1, 60, 60))
    )
    assert all(later > first for first, later in zip(few.explained, many.explained, strict=True))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() and many.rank == same.rank


def test_targets_are_logarithms_of_the_second_reading(read_again: Trace) -> None:
    hidden, target = pair(read_again, 1, 1)
    assert hidden.shape == (20, 32) and target.shape == (20, 2)
    assert np.allclose(np.exp(target.numpy().T), read_again.key_numbers("reconstruction", 1, 1)[:, :20], rtol=1e-5)


def test_spearman_is_of_ranks() -> None:
    one = torch.tensor([0.1, 5.0, 2.0, 3.0])
    assert spearman(one, one.exp()) == pytest.approx(1) and spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, torch.tensor([1.0, 4.0, 3.0, 2.0])) == pytest.approx(0.8)


def test_what_cannot_train_is_refused(read_again: Trace, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(TraceError, match=r"no layer inputs, .*\nRecord it again with --hidden --reread"):
        train_scorers([recorded(tmp_path / "a", store="maps", reread=True)], tmp_path / "s")
    with pytest.raises(TraceError, match="no second readings"):
        train_scorers([recorded(tmp_path / "b", store="maps", hidden=True)], tmp_path / "s")
    one = recorded(tmp_path / "c", store="maps", hidden=True, reread=True)
    with pytest.raises(UsageError, match="one prompt is too few"):
        train_scorers([one], tmp_path / "s")
    with pytest.raises(UsageError, match="width of -1"):
        ScorerSettings(width=-1)
    with pytest.raises(UsageError, match="rate=0 is not above 0"):
        ScorerSettings(rate=0)
    assert not (tmp_path / "s").exists()


def test_scorers_of_another_model_are_refused(tmp_path: Path) -> None:
    made = recorded(tmp_path, hidden=True)
    with pytest.raises(UsageError, match=r"scorers demo are for demo: 4 layers.*the model has 2, 32, 2"):
        compile_replay(made, ["kvzap"], "50%")
    with pytest.raises(UsageError, match="scorers demo are for demo"):
        decode(build("llama"), tokens(12), EvictionPlan.published(parse_policy("kvzap")), 5, prompt=8)
    with pytest.raises(UsageError, match=r"no scorers nowhere: .*\n.*kvscope gate scorers"):
        compile_replay(made, ["kvzap:scorers=nowhere"], "50%")
    other = written(tmp_path, build("qwen2"))
    with pytest.raises(UsageError, match="this model has other weights"):
        compile_replay(made, [f"kvzap:scorers={other}"], "50%")
    (tmp_path / "plain").mkdir()
    with pytest.raises(TraceError, match=r"kvzap.* needs layer inputs, .*\n.*--hidden"):
        compile_replay(recorded(tmp_path / "plain"), [f"kvzap:scorers={written(tmp_path, build('llama'))}"], "50%")


def test_the_scorers_of_the_bundled_model_fit_the_example() -> None:
    assert load_scorers("demo").facts.width == 32
    compile_replay(open_trace(EXAMPLE), ["kvzap"], "40%")


@pytest.mark.parametrize("damage", ["number", "metadata", "kind", "text"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = Path(written(tmp_path, build("llama")))
    content = path.read_bytes()
    if damage == "number":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif damage == "metadata":
        path.write_bytes(content.replace(b'\\"layers\\": 2', b'\\"layers\\": 3'))
        assert path.read_bytes() != content
    elif damage == "kind":
        save_file(load_file(path), path)
    else:
        path.write_text("no scorers")
    with pytest.raises(ModelError, match="kvscope gate scorers"):
        load_scorers(str(path))
