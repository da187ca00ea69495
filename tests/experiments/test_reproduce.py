"""Papers: their files are sound, their claims are tested on the same sequences, and one runs from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvscope.cli.app import run as run_command
from kvscope.core.claim_records import REPRODUCTION, Claim, Finding, Reproduction, Setting
from kvscope.core.errors import UsageError
from kvscope.core.experiment_records import CellRecord
from kvscope.core.json_records import plain
from kvscope.experiments import paper as papers
from kvscope.experiments.cells import Store
from kvscope.experiments.paper import Paper, paper_names, paper_of, read_paper
from kvscope.experiments.plan import make_plan
from kvscope.experiments.reproduce import Choices, notes_of, prepare
from kvscope.results.answers import OF_ANSWERS
from kvscope.results.claims import Results, all_values, evaluate
from kvscope.results.claims_table import markdown, remarks, verdict
from kvscope.results.outcome import OUTCOMES
from kvscope.results.statistics import interval, paired
from tests.results.test_experiment import cell

NAMES = ("a2sf", "attention-gate", "recycled-attention", "tova", "vatp")
CLAIM = Claim(
    says="a is better than b",
    where="Table 1",
    part="p",
    metric="retained_mass",
    better=Setting(policy="a", budget="20%"),
    worse=Setting(policy="b", budget="20%"),
    bundled="because of c",
)
EVEN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def found(claim: Claim, *cells: CellRecord) -> Finding:
    """Return what is found of a claim in some cells."""
    results = Results((one, run) for one in cells for run in one.runs)
    (finding,) = evaluate([claim], {"p": results}, {})
    return finding


def two(
    a: list[float | None], b: list[float | None], trace: str = "x", clusters: list[int] | None = None
) -> CellRecord:
    """Return a cell of policies a and b at 20 %, with their retained mass."""
    values = {("a", "20%"): {"retained_mass": a}, ("b", "20%"): {"retained_mass": b}}
    return cell(trace, values, clusters=clusters)


def plus(values: list[float], more: float) -> list[float | None]:
    return [value + more for value in values]


def test_a_claim_agrees_differs_or_is_not_certain() -> None:
    assert found(CLAIM, two(plus(EVEN, 0.05), plus(EVEN, 0))).agreement == "agrees"
    assert found(CLAIM, two(plus(EVEN, 0), plus(EVEN, 0.05))).agreement == "differs"
    mixed = [value + (0.05 if number % 2 else -0.05) for number, value in enumerate(EVEN)]
    assert found(CLAIM, two(plus(mixed, 0), plus(EVEN, 0))).agreement == "not certain"
    assert found(CLAIM, two(plus(EVEN, 0), plus(EVEN, 0))).agreement == "not certain"


def test_what_is_found_is_the_paired_difference_over_all_traces() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 12)).tolist()
    finding = found(CLAIM, two(a[:5], b[:5], "x"), two(a[5:], b[5:], "y"))
    expected = paired(b, a)
    assert (finding.better, finding.worse) == (expected.mean_b, expected.mean_a)
    assert (finding.difference, finding.p) == (expected.difference, expected.p)
    assert (finding.low, finding.high) == (expected.low, expected.high)
    assert (finding.sequences, finding.clusters) == (12, 12)


def test_a_lower_loss_is_better() -> None:
    claim = replace(CLAIM, metric="perplexity")
    values = {("a", "20%"): {}, ("b", "20%"): {"retained_mass": plus(EVEN, 0)}}
    values[("a", "20%")] = values[("b", "20%")]
    losses = {"a": EVEN, "b": [one + 0.1 for one in EVEN]}
    made = cell("x", values, losses=losses)  # type: ignore[arg-type]
    finding = found(claim, made)
    assert finding.agreement == "agrees"
    assert finding.better == pytest.approx(np.exp(EVEN).mean())
    assert finding.difference is not None and finding.difference < 0
    turned = replace(claim, better=claim.worse, worse=claim.better)
    assert found(turned, made).agreement == "differs"


def test_near_copies_count_as_one() -> None:
    assert (
        found(CLAIM, two(plus(EVEN, 0.05), plus(EVEN, 0), clusters=[0, 0, 0, 0, 1, 1, 2, 2])).agreement == "not certain"
    )


def test_what_has_no_value_is_missing_and_said() -> None:
    made = two(plus(EVEN, 0), plus(EVEN, 0))
    assert found(replace(CLAIM, worse=Setting(policy="c", budget="20%")), made).why == "there is no result of c at 20%"
    assert found(replace(CLAIM, metric="ideal_cosine"), made).why == "a at 20% has no ideal_cosine"
    apart = two([*plus(EVEN, 0), None], [*([None] * 8), 1.0])
    assert found(CLAIM, apart).why == "the two settings share no sequence"
    (unrun,) = evaluate([CLAIM], {}, {"p": "it needs texts"})
    assert {unrun.agreement, found(CLAIM, apart).agreement} == {"missing"} and unrun.why == "it needs texts"


def test_sequences_that_one_side_lacks_are_left_out_and_counted() -> None:
    finding = found(CLAIM, two(plus(EVEN, 0.05), [*plus(EVEN, 0)[:7], None]))
    assert finding.sequences == 7 and finding.why == "1 of 8 sequences have no value of b"


def test_equal_keys_are_found_by_interpolation_in_each_sequence() -> None:
    count = 8
    values = {
        ("a", "20%"): {"retained_mass": [0.9] * count, "held_keys": [15.0] * count},
        ("b", "20%"): {"retained_mass": [0.5] * count, "held_keys": [10.0] * count},
        ("b", "40%"): {"retained_mass": [0.7] * count, "held_keys": [20.0] * count},
        ("b", "60%"): {"retained_mass": [1.0] * count, "held_keys": [30.0] * count},
    }
    claim = replace(CLAIM, worse=Setting(policy="b"), equal="held_keys")
    finding = found(claim, cell("x", values))
    assert finding.worse == pytest.approx(0.6) and finding.agreement == "agrees"
    values[("a", "20%")]["held_keys"] = [40.0] * count
    beyond = found(claim, cell("x", values))
    assert beyond.agreement == "missing" and "enclose the held keys of no sequence" in beyond.why
    values[("a", "20%")]["held_keys"] = [40.0, *[15.0] * (count - 1)]
    assert found(claim, cell("x", values)).why == "1 of 8 sequences have no value of b"


def test_every_setting_has_its_mean_and_interval() -> None:
    made = two(plus(EVEN, 0.05), [*plus(EVEN, 0)[:7], None])
    results = Results((made, run) for run in made.runs)
    a, b = all_values([CLAIM, replace(CLAIM, says="again")], {"p": results})
    assert a.setting == CLAIM.better and b.setting == CLAIM.worse and (a.sequences, b.sequences) == (8, 7)
    assert (a.mean, a.low, a.high) == (pytest.approx(0.5), *interval(np.array(plus(EVEN, 0.05), float)))
    assert list(all_values([replace(CLAIM, metric="ideal_cosine")], {"p": results})) == []
    assert list(all_values([CLAIM], {})) == []


def test_the_papers_are_there() -> None:
    assert tuple(paper_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", ["demo", "paper"])
def test_claims_name_runs_of_their_plan(name: str, model: str, tmp_path: Path) -> None:
    paper = read_paper(name)
    texts, gate = tmp_path / "texts.jsonl", tmp_path / "gate.safetensors"
    texts.write_text(json.dumps({"prompt": "Once", "continuation": " upon", "answers": ["upon"]}) + "\n")
    gate.write_bytes(b"any")
    given = Choices(paper.model, (str(texts),), str(gate) if paper.gated else None)
    prepared = prepare(paper, Choices() if model == "demo" else given, f"reproduce-{name}")
    assert set(prepared.experiments) == set(paper.parts) and not prepared.missing
    labels = {}
    for part, experiment in prepared.experiments.items():
        assert len(experiment.prefill) == len(experiment.models) == len(experiment.seeds) == 1, "a sequence counts once"
        plan = make_plan(experiment, Store.under(tmp_path, tmp_path), "cpu")
        labels[part] = {(one.label, one.budget) for requests in plan.requests.values() for one in requests}
    for claim in prepared.claims:
        known = labels[claim.part]
        assert (claim.better.policy, claim.better.budget) in known
        if claim.equal is None:
            assert (claim.worse.policy, claim.worse.budget) in known
        else:
            assert len({budget for policy, budget in known if policy == claim.worse.policy}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_claims_are_measured(name: str) -> None:
    prepared = prepare(read_paper(name), Choices(), "x")
    for claim in prepared.claims:
        experiment = prepared.experiments[claim.part]
        assert experiment.metrics is not None
        for metric in (claim.metric, claim.equal):
            if metric in OUTCOMES or metric in ("answer_first", "answer_loss"):
                assert "closed-loop" in experiment.loop_steps
            elif metric in OF_ANSWERS:
                assert "generate" in experiment.loop_steps
            else:
                assert metric is None or metric in experiment.metrics


@pytest.mark.parametrize("name", NAMES)
def test_at_most_one_part_takes_prompts(name: str) -> None:
    assert sum(part.texts is not None for part in read_paper(name).parts.values()) <= 1


def test_the_values_are_those_of_the_papers() -> None:
    """A spot check of numbers that were copied by hand: TOVA Table 3 at 512 keys, A2SF Table 2."""
    tova = {(claim.better.policy, claim.worse.policy): claim.paper for claim in read_paper("tova").claims[:3]}
    assert tova["tova", "streaming-llm:sinks=4"] == (7.41, 7.73)
    assert tova["tova", "h2o"] == (7.41, 7.75)
    assert tova["tova", "window"] == (7.41, 2184.62)
    assert read_paper("a2sf").claims[0].paper == (0.991, 0.967)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_results_are_of_the_claims_and_settings_in_the_package(name: str) -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / f"reproduce-{name}.json"
    record = REPRODUCTION.read(file, Reproduction, example="")
    prepared = prepare(read_paper(name), Choices(), f"reproduce-{name}")
    assert tuple(finding.claim for finding in record.findings) == prepared.claims
    assert record.notes == tuple(notes_of(prepared)) and record.model == "demo"
    assert record.count("missing") == 0
    for finding in record.findings:
        assert finding.agreement == "agrees" or finding.claim.bundled, "a difference has its reason"


def test_another_model_is_said_and_needs_its_texts() -> None:
    paper = read_paper("tova")
    assert notes_of(prepare(paper, Choices(), "x"))[0] == "The model is demo, not the paper's (llama2-7b)."
    with pytest.raises(UsageError, match="do not come with kvscope") as refused:
        prepare(paper, Choices("llama2-7b"), "x")
    assert refused.value.todo.startswith("Give --prompts: books of PG-19")
    same = prepare(paper, Choices("meta-llama/Llama-2-7b-hf", ("README.md",)), "x")
    assert not any("The model is" in note for note in notes_of(same))
    assert same.experiments["text"].prompts == ("README.md",)
    only = prepare(read_paper("recycled-attention"), Choices("llama3.1-8b"), "x")
    assert set(only.experiments) == {"answers"} and "--prompts" in only.missing["text"]


def test_gates_and_prompts_are_taken_only_where_they_are_read() -> None:
    with pytest.raises(UsageError, match="needs no gate"):
        prepare(read_paper("tova"), Choices(gate="g"), "x")
    with pytest.raises(UsageError, match="has no gate that comes with kvscope"):
        prepare(read_paper("attention-gate"), Choices("llama2-7b", ("p",)), "x")
    gated = prepare(read_paper("attention-gate"), Choices("llama2-7b", ("p",), "mine.safetensors"), "x")
    assert gated.experiments["answers"].hidden is True
    assert gated.claims[0].better.policy == "attention-gate(gate=mine.safetensors)"


TINY = {
    "title": "Tiny",
    "source": "nowhere",
    "about": "a test",
    "model": "llama2-7b",
    "parts": {
        "text": {
            "about": "a few texts",
            "texts": "texts",
            "settings": {
                "prefill": "stream",
                "budgets": ["50%"],
                "policies": ["window", "random"],
                "max_new_tokens": 1,
            },
            "bundled": {"prompts": "tiny.txt", "metrics": ["retained_mass"], "steps": ["trace", "replay"]},
        }
    },
    "claims": [
        {
            "says": "a window is better than chance",
            "where": "here",
            "part": "text",
            "metric": "retained_mass",
            "better": {"policy": "window", "budget": "50%"},
            "worse": {"policy": "random", "budget": "50%"},
            "paper": [1, 0],
            "bundled": "there is one text",
        }
    ],
    "bundled": ["It is tiny."],
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paper:
    """A paper with one short text, in place of those that come with the package."""
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(json.dumps(TINY))  # JSON is YAML
    (folder / "tiny.txt").write_text("The sea was as black as the night, and the night as the sea.")
    monkeypatch.setattr(papers, "_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return read_paper("tiny")


def test_a_paper_runs_from_end_to_end_and_is_not_done_twice(tiny: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["reproduce", "tiny", "--device", "cpu", "--quiet"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in ("Of 1 claim: 1 not certain.", "The model is demo, not the paper's (llama2-7b).", "It is tiny."):
        assert said in out
    assert Path("reports/reproduce-tiny-text.html").is_file()
    record = REPRODUCTION.read(Path("reports/reproduce-tiny.json"), Reproduction, example="")
    assert record.summaries == {"text": "reproduce-tiny-text"} and record.paper_model == "llama2-7b"
    assert record.findings[0].sequences == 1 and record.findings[0].claim.paper == (1, 0)
    before = {path: path.stat().st_mtime_ns for path in Path("traces").rglob("*")}
    assert run_command(["reproduce", "tiny", "--device", "cpu", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == json.loads(json.dumps(plain(record)))["findings"]
    assert before == {path: path.stat().st_mtime_ns for path in Path("traces").rglob("*")}
    assert run_command(["reproduce", "tiny", "--device", "cpu", "--quiet", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown(record, bundled=True)


def test_a_dry_run_writes_nothing(tiny: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["reproduce", "tiny", "--device", "cpu", "--dry-run", "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text"]["runs_to_do"] == 2 and facts["text"]["traces_to_do"] == 1
    assert not Path("reports").exists() and not Path("traces").exists()


def test_the_list_names_every_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["reproduce", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(NAMES)
    assert run_command(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)


def test_an_unknown_name_is_refused_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["reproduce", "tovaa", "--quiet"]) == 2
    assert capsys.readouterr().err == "error: there is no paper 'tovaa' to reproduce\nDid you mean tova?\n"


def test_a_file_of_another_kind_is_not_replaced(tiny: Paper, capsys: pytest.CaptureFixture[str]) -> None:
    Path("reports").mkdir()
    Path("reports/reproduce-tiny.json").write_text("{}")
    assert run_command(["reproduce", "tiny", "--quiet"]) == 1
    assert "is not a kvscope reproduction of a paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("claims", [TINY["claims"][0] | {"part": "other"}], "names the part 'other'"),  # type: ignore[index,operator]
        ("claims", [TINY["claims"][0] | {"paper": [1]}], "has two values"),  # type: ignore[index,operator]
        ("claims", [TINY["claims"][0] | {"equal": "held_keys"}], "has no budget"),  # type: ignore[index,operator]
        ("title", 3, "title"),
    ],
)
def test_a_wrong_file_of_a_paper_is_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        paper_of({**TINY, key: value}, "tiny")


def test_remarks_say_what_is_missing_and_why_the_bundled_model_differs() -> None:
    agrees = found(CLAIM, two(plus(EVEN, 0.05), plus(EVEN, 0)))
    differs = found(CLAIM, two(plus(EVEN, 0), plus(EVEN, 0.05)))
    (missing,) = evaluate([CLAIM], {}, {"p": "it needs texts"})
    record = Reproduction(
        name="n",
        title="t",
        source="s",
        model="demo",
        paper_model="m",
        notes=(),
        versions={},
        summaries={},
        findings=(agrees, differs, differs, missing),
        values=(),
    )
    assert remarks(record, bundled=True) == ["2, 3: because of c", "4: it needs texts"]
    assert remarks(record, bundled=False) == ["4: it needs texts"]
    assert verdict(record) == "Of 4 claims: 1 agrees, 2 differs, 1 missing."
    assert "| 1 | a is better than b |" in markdown(record, bundled=True)
