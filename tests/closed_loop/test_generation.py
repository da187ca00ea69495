"""Answers under a policy: what is generated with evicted keys removed says what the closed loop foresees."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

import kvscope
from kvscope.closed_loop.decode import DecodeJob, attention_facts, decode
from kvscope.closed_loop.generation import GenerateJob
from kvscope.closed_loop.prompt_pass import PromptPass
from kvscope.core.budget import Budget
from kvscope.core.errors import UsageError
from kvscope.core.options import ClosedLoopOptions, GenerateOptions, Loop, OutputOptions, Prefill, ReplayOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.model.derotation import derotations
from kvscope.model.short_cache import holds_keys_alone
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.results.export import export
from kvscope.results.store import Replay, open_replay
from kvscope.results.stream import by_sequence
from kvscope.tasks import make_examples, parse_task, score
from kvscope.tasks.dataset import as_lines
from kvscope.tasks.make import Lengths, words
from kvscope.trace.reader import Trace, open_trace
from tests.model.tiny import MODELS, build, tokens
from tests.models.build import build as built

POLICIES = ["full", "window", "h2o", "tova", "a2sf", "snapkv:window=8"]
NEW = 5


def needles(folder: Path, metric: str = "exact", number: int = 3, lengths: tuple[int, ...] = (40, 80)) -> Path:
    """Write needles at several depths, in the wording that the bundled model understands."""
    family = parse_task("needle:wording=notes")
    lines = []
    for length in lengths:
        for example in make_examples(family, Lengths(length, words, "words"), number, seed=3):
            lines.append({**json.loads(as_lines([example])), "metric": metric})
    file = folder / "needles.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("traces")
    return kvscope.trace("demo", [needles(folder)], output=folder / "t", max_new_tokens=NEW, dtype="float64")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Prompts of which every token can be decoded in little time."""
    folder = tmp_path_factory.mktemp("short")
    file = needles(folder, lengths=(20, 30))
    return kvscope.trace("demo", [file], output=folder / "t", max_new_tokens=NEW, dtype="float64")


def replayed(trace: Trace, path: Path, policies: list[str], **options: object) -> Replay:
    given = {"closed": ClosedLoopOptions(dtype="float64"), "generate": GenerateOptions(), **options}
    job = compile_replay(trace, policies, "20%,50%", ReplayOptions(**given))  # type: ignore[arg-type]
    return job.execute(OutputOptions(path))


def both(replay: Replay) -> dict[tuple[int, int], tuple[float, float]]:
    """Return score and all-tokens-first-choice of every closed run and example that have both."""
    runs = [run.run for run in replay.info.runs if run.loop == "closed"]
    found = by_sequence(replay, runs, ["answer_score", "answer_first"])
    return {
        (run, sequence): (found[run, "answer_score"][sequence], first)
        for run in runs
        for sequence, first in found[run, "answer_first"].items()
    }


@pytest.mark.parametrize("prefill", list(Prefill))
def test_generated_answers_are_those_of_the_closed_loop(
    trace: Trace, short: Trace, prefill: Prefill, tmp_path: Path
) -> None:
    policies, made = (POLICIES, trace) if prefill == Prefill.full else (POLICIES[:2], short)
    found = both(replayed(made, tmp_path / "r", policies, prefill=prefill))
    assert len(found) == (2 * len(policies) - 1) * 6, "every example has both: the model answers all with a full cache"
    assert set(found.values()) == {(0.0, 0.0), (1.0, 1.0)}, "equal, and some right and some wrong"


@pytest.fixture(scope="module")
def generated(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return replayed(trace, tmp_path_factory.mktemp("reports") / "r", ["full", "window"])


def test_the_full_cache_says_what_was_recorded(trace: Trace, generated: Replay) -> None:
    (full,) = (run.run for run in generated.info.runs if run.loop == "closed" and run.policy == "full")
    said = generated.answers(full)
    for number, sequence in enumerate(trace.sequences):
        texts = trace.tokens(number)["text"]
        (row,) = said[said["sequence"] == number].itertuples()
        assert row.text == "".join(texts[sequence.prompt :])
        assert row.answer_score == score("exact", row.text, trace.record.sequences[number].answers or [])


def test_progress_is_told_after_every_generated_token(trace: Trace) -> None:
    options = ReplayOptions(closed=ClosedLoopOptions(), generate=GenerateOptions())
    job = compile_replay(trace, ["window", "h2o"], "20%,50%", options).generate
    assert job is not None

    class Sink:
        def answer(self, run: int, sequence: int, text: str, tokens: int, score: float) -> None:
            assert tokens == 4

    told: list[float] = []
    replace(job, examples=job.examples[:1], max_new_tokens=4, stops=frozenset()).execute(Sink(), told.append)
    assert told == [eighth / 8 for eighth in range(1, 9)], "both budgets of a policy are one batch, of four tokens"


def test_what_the_summary_says_of_answers(generated: Replay) -> None:
    open_replay(generated.path, verify=True)
    said = generated.answers()
    assert all(not run.tasks and "answer_score" not in run.metrics for run in generated.summary.runs[:3])
    for run in generated.summary.runs[3:]:
        own = said[said["run"] == run.run]
        assert run.mean("answer_score") == pytest.approx(own["answer_score"].mean())
        assert [(task.task, task.length) for task in run.tasks] == [
            ("needle:wording=notes", 40),
            ("needle:wording=notes", 80),
        ]
        for place, task in enumerate(run.tasks):
            of_task = own[own["sequence"] // 3 == place]["answer_score"]
            assert task.metrics["answer_score"].mean == pytest.approx(of_task.mean())
            assert task.metrics["answer_score"].count == 3
        interval = run.metrics["answer_score"]
        assert interval.low is not None and interval.low <= (interval.mean or 0) <= (interval.high or 0)


def test_answer_losses_are_those_of_the_tokens(generated: Replay) -> None:
    run = generated.summary.runs[-1]
    losses = []
    for example in generated.info.trace.examples:
        tokens = generated.tokens(run.run, example.sequence).set_index("position")
        (span,) = example.spans
        losses.append(tokens.loc[span.start : span.stop - 1, "nll_policy"].mean())
    assert run.mean("answer_loss") == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_answers_are_exported_beside_the_other_metrics(generated: Replay, tmp_path: Path) -> None:
    export(generated, tmp_path / "out")
    rows = pd.read_parquet(tmp_path / "out" / "examples.parquet")
    assert len(rows) == 3 * 6
    said = generated.answers().set_index(["run", "sequence"])
    for row in rows.itertuples():
        assert row.text == said.loc[(row.run, row.sequence), "text"]
        assert row.answer_score == said.loc[(row.run, row.sequence), "answer_score"]
    evicting = rows[rows["policy"] == "window"]
    assert evicting["retained_mass"].notna().all() and evicting["perplexity_ratio"].notna().all()
    tasks = pd.read_parquet(tmp_path / "out" / "tasks.parquet")
    assert len(tasks) == 3 * 2 and (tasks["answer_score_count"] == 3).all()


def test_a_shorter_answer_and_another_score(trace: Trace, tmp_path: Path) -> None:
    made = replayed(trace, tmp_path / "r", ["window"], generate=GenerateOptions(max_new_tokens=1, metric="f1"))
    assert set(made.answers()["tokens"]) == {1}
    assert {example.metric for example in made.info.trace.examples} == {"f1"}
    assert set(made.answers()["answer_score"]) == {0.0}, "one token is no whole number of three digits"


def refused(trace: Trace, policy: str, **options: object) -> str:
    given = {"closed": ClosedLoopOptions(), "generate": GenerateOptions(), **options}
    with pytest.raises(UsageError) as error:
        compile_replay(trace, [policy], "50%", ReplayOptions(**given))  # type: ignore[arg-type]
    assert error.value.what and error.value.todo
    return error.value.what


def test_what_cannot_be_generated_is_refused(trace: Trace) -> None:
    assert "keys that a smaller cache does not hold" in refused(trace, "recycled-attention")
    assert "belady" in refused(trace, "belady")
    assert "the closed loop, which is off" in refused(trace, "window", closed=None)
    assert "no score is called 'exat'" in refused(trace, "window", generate=GenerateOptions(metric="exat"))
    long = GenerateOptions(max_new_tokens=100_000)
    assert "100000 more exceed the model's context" in refused(trace, "window", generate=long)
    example = open_trace(Path(__file__).parents[2] / "traces" / "example")
    assert "has no right answers" in refused(example, "window")


def forwards(model: Any) -> list[int]:
    """Return a list that receives the number of tokens of every pass of a model."""
    found: list[int] = []

    def note(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        found.append(options["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize(("name", "positions"), [("llama", "original"), ("llama", "compacted"), ("gemma3", "original")])
def test_one_pass_over_a_prompt_serves_every_run(name: str, positions: str) -> None:
    """Every generated token is the first choice after those before it, as decoding of the finished text gives it."""
    model, prompt, room = build(name).double(), 12, 20
    ids = tokens(room)
    with torch.no_grad():
        facts = attention_facts(model, ids)
        rotary = derotations(model, ids[:, :1]) if positions == "compacted" else None
    passes, read = forwards(model), PromptPass()
    for spec in ("full", "window", "h2o", "tova", "keydiff"):
        plan, given = EvictionPlan.published(parse_policy(spec)), ids.clone()
        made = DecodeJob(model, given, plan, [5], prompt, Prefill.full, 0, facts, rotary).generate(frozenset(), read)
        (made,) = made
        assert len(made) == room - prompt and given[0, prompt:].tolist() == made
        logits = decode(model, given, plan, 5, prompt=prompt, positions=positions).logits
        assert logits[prompt - 1 : -1].argmax(-1).tolist() == made
        stop = frozenset([made[3]])
        alone = DecodeJob(model, ids.clone(), plan, [5], prompt, Prefill.full, 0, facts, rotary).generate(stop)
        assert alone == [made[: made.index(made[3])]], "a token that ends the text is not returned"
    assert passes.count(prompt) == 1 + 2 * 5, "once for all runs, and once in each decoding that shares nothing"


def test_a_trace_of_prompts_alone_needs_a_length(tmp_path: Path) -> None:
    prompts = kvscope.trace(
        "demo", [needles(tmp_path, number=1, lengths=(20, 30))], output=tmp_path / "t", max_new_tokens=0
    )
    assert "no tokens after its prompt" in refused(prompts, "window", prefill=Prefill.stream)
    options = {"generate": GenerateOptions(max_new_tokens=NEW), "prefill": Prefill.stream}
    made = replayed(prompts, tmp_path / "r", ["full"], **options)
    assert made.summary.runs[-1].mean("answer_score") == 1
    assert "answer_loss" not in made.summary.metrics, "no answer follows the prompts"


BATCHED = [
    ("llama", "original"),
    ("llama", "compacted"),
    ("gemma3", "original"),
    ("gpt_oss", "original"),
    ("deepseek_v3", "original"),
    ("gemma4_text", "original"),
]


@pytest.mark.slow
@pytest.mark.parametrize("prefill", list(Prefill))
@pytest.mark.parametrize(("name", "positions"), BATCHED)
def test_budgets_that_generate_as_a_batch_say_what_each_says_alone(name: str, positions: str, prefill: Prefill) -> None:
    """Padding, windows, sinks and latent vectors of one budget do not reach another; one may end before the others."""
    model = (build(name) if name in MODELS else built(name)).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # as a model is loaded in float64
    prompt, room, budgets = 12, 24, [4, 9, 6]
    ids = tokens(room)
    with torch.no_grad():
        facts = attention_facts(model, ids)
        rotary = derotations(model, ids[:, :1]) if positions == "compacted" else None

    def generated(spec: str, chosen: list[int], stops: frozenset[int] = frozenset()) -> list[list[int]]:
        plan, given = EvictionPlan.published(parse_policy(spec)), ids.repeat(len(chosen), 1)
        return DecodeJob(model, given, plan, chosen, prompt, prefill, 0, facts, rotary).generate(stops)

    differ = 0
    for spec in ("h2o", "tova", "window", "keydiff", "vatp", "random"):
        alone = [generated(spec, [budget])[0] for budget in budgets]
        assert generated(spec, budgets) == alone
        differ += len(set(map(tuple, alone))) > 1
        stop = frozenset([alone[0][2]])
        assert generated(spec, budgets, stop) == [generated(spec, [budget], stop)[0] for budget in budgets]
    assert differ, "budgets that say the same do not show that they are kept apart"


def test_equal_budgets_say_the_same() -> None:

    model, ids = build("llama").double(), tokens(20)
    with torch.no_grad():
        facts = attention_facts(model, ids)
    plan = EvictionPlan.published(parse_policy("full"))
    twice = DecodeJob(model, ids.repeat(2, 1), plan, [20, 20], 12, Prefill.full, 0, facts).generate(frozenset())
    assert twice[0] == twice[1] and len(twice[0]) == 8


def test_the_budgets_of_a_policy_cost_one_pass_for_each_token(trace: Trace, tmp_path: Path) -> None:
    closed = ClosedLoopOptions(dtype="float64")
    options = ReplayOptions(closed=closed, generate=GenerateOptions())
    job = compile_replay(trace, ["h2o"], "20%,40%,60%", options)
    assert job.generate is not None
    seen = forwards(job.generate.closed.model)
    sink: list[tuple[int, int]] = []

    class Sink:
        def answer(self, run: int, sequence: int, text: str, tokens: int, score: float) -> None:
            sink.append((run, tokens))

    with torch.no_grad():
        job.generate.execute(Sink())
    examples = len(job.generate.examples)
    assert len(sink) == 3 * examples
    assert seen.count(1) <= examples * (NEW - 1), "three budgets, and no more passes than one of them has"


@pytest.mark.parametrize(("name", "alone"), [("llama", True), ("deepseek_v3", True), ("qwen3_next", False)])
def test_states_of_linear_layers_keep_runs_apart(name: str, alone: bool) -> None:
    """Only a model that holds keys and values alone reads a prompt once for all entries of a batch."""
    assert holds_keys_alone(built(name)) is alone


@pytest.mark.parametrize(
    ("name", "images", "sizes"), [("llama", False, [2]), ("llama", True, [1, 1]), ("qwen3_next", False, [1, 1])]
)
def test_runs_generate_alone_where_the_model_keeps_more_than_keys(name: str, images: bool, sizes: list[int]) -> None:
    plan = EvictionPlan.published(parse_policy("h2o"))
    runs = runs_of([plan], [Budget.parse(4), Budget.parse(9)], Loop.closed)
    closed = SimpleNamespace(runs=runs, model=built(name))
    passage = SimpleNamespace(images=("an image",) if images else ())
    job = GenerateJob(closed, None, [], None, frozenset())  # type: ignore[arg-type]
    assert [len(batch) for batch in job._batches(passage)] == sizes  # type: ignore[arg-type]
