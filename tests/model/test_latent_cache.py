"""Latent caches (DeepSeek): the entries that must be held are the union over the heads."""

from pathlib import Path

import numpy as np
import pytest

from kvscope.cli.summary import columns
from kvscope.closed_loop.compile import compile_perplexity, compile_verify
from kvscope.core.errors import UsageError
from kvscope.core.options import (
    ModelSource,
    OutputOptions,
    PlanOptions,
    Prefill,
    ReplayOptions,
    TuneLevel,
    TuneOptions,
    VerifyOptions,
)
from kvscope.core.recording_options import StoreOptions, TextOptions
from kvscope.core.summary_records import SUMMARY
from kvscope.model.compile import compile_recording
from kvscope.replay.compile import compile_replay
from kvscope.report.page import page_data
from kvscope.report.panels.overview import overview
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.results.stream import by_sequence
from kvscope.trace.reader import Trace
from kvscope.tune.compile import compile_tune
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))


def recorded(
    folder: Path,
    name: str,
    store: StoreOptions = StoreOptions(),  # noqa: B008  frozen
    prompts: int = 1,
) -> Trace:
    files = [folder / f"prompt{number}.txt" for number in range(prompts)]
    for number, file in enumerate(files):
        file.write_text(PROMPT[3 * number :])
    model = ModelSource(str(saved(folder / "model", name)))
    output, text = OutputOptions(folder / "trace"), TextOptions(max_new_tokens=10)
    return compile_recording(model, files, output, text=text, store=store).execute()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return recorded(tmp_path_factory.mktemp("latent"), "deepseek_v3", StoreOptions("maps+vectors"))


def replayed(trace: Trace, folder: Path, policies: list[str], scope: str | None = None) -> Replay:
    options = ReplayOptions(plan=PlanOptions(scope=scope))
    return compile_replay(trace, policies, "6", options).execute(OutputOptions(folder))


def entries(replay: Replay, number: int) -> float:
    found = replay.summary.runs[number].mean("latent_entries")
    assert found is not None
    return found


def test_entries_are_the_union_over_heads(trace: Trace, tmp_path: Path) -> None:
    assert (trace.header.latent_size, trace.kv_heads) == (24, 4)
    assert any(
        line.startswith("Latent cache: the heads of a layer share one vector of 24") for line in trace.approximate
    )
    made = replayed(trace, tmp_path / "r", ["h2o", "a2sf", "snapkv", "tova", "belady"], "kv_head")
    sequence, more = trace.sequences[0], []
    for run in made.summary.runs:
        assert run.scope == "kv_head"
        masks = [made.resident(run.run, 0, layer)[:, sequence.prompt :] for layer in trace.layers]  # [G, steps, T]
        held = entries(made, run.run)
        assert np.isclose(held, np.mean([mask.any(0).sum(-1) for mask in masks]))
        assert np.isclose(run.mean("latent_bytes") or 0, held * 24 * 2 * 3)
        more.append(held - float(np.mean([mask.sum(-1) for mask in masks])))
    assert min(more) > -1e-9 and max(more) > 9, "heads that keep different keys hold more entries than keys"


def test_the_heads_of_a_layer_decide_as_one_by_default(trace: Trace, tmp_path: Path) -> None:
    """Whoever can; a2sf then evicts what a plain loop over the mean of all heads evicts."""
    names = ["h2o", "a2sf", "snapkv", "cake", "random", "tova", "belady", "window", "ideal", "keydiff", "ada-kv"]
    made = replayed(trace, tmp_path / "r", names)
    scopes = {run.policy: run.scope for run in made.info.runs}
    assert scopes.pop("ideal") == scopes.pop("keydiff") == scopes.pop("ada-kv") == "kv_head"
    assert set(scopes.values()) == {"layer"}
    labels = [run.label for run in made.info.runs]
    assert labels[:3] == ["h2o [per layer]", "a2sf [per layer]", "snapkv [per layer]"]
    assert {"belady(scope=layer)", "tova", "window", "keydiff"} <= set(labels)
    for run in made.info.runs:
        masks = [made.resident(run.run, 0, layer) for layer in trace.layers]
        if run.scope == "layer":
            assert all((mask == mask[:1]).all() for mask in masks), run.label
            assert entries(made, run.run) == pytest.approx(made.summary.runs[run.run].mean("held_keys"))
    length, prompt = trace.sequences[0].length, trace.sequences[0].prompt
    for layer in trace.layers:
        rows = trace.attention(0, layer).astype(np.float64)  # [H, T, T]
        score, alive = np.zeros(length), np.zeros(length, bool)
        for t in range(length):
            alive[t] = True
            live = rows[:, t] * alive
            score = 0.2 * score + (live / live.sum(-1, keepdims=True)).mean(0)
            while t >= prompt - 1 and alive.sum() > 6:
                free = np.flatnonzero(alive)
                alive[free[score[free].argmin()]] = False
            assert np.array_equal(made.resident(1, 0, layer)[0, t], alive), (layer, t)


def test_a_choice_is_kept_and_what_cannot_be_is_refused(trace: Trace, tmp_path: Path) -> None:
    made = replayed(trace, tmp_path / "r", ["tova:scope=kv_head"])
    assert [(run.label, run.scope) for run in made.info.runs] == [("tova(scope=kv_head)", "kv_head")]
    for name, scope, why in (
        ("keydiff", "layer", "--scope layer cannot be used with keydiff: it reads keys of each key/value head"),
        ("ada-kv", "layer", "allocation ada gives each head its own budget"),
        ("ideal", "layer", "it holds every key, and reads some"),
        ("roco:variant=easykv", "layer", "it reproduces published code"),
        ("window", "kv_head", "its rule is one decision for the layer"),
        ("h2o", "token", "--scope 'token' is unknown"),
    ):
        with pytest.raises(UsageError, match=why):
            replayed(trace, tmp_path / "no", [name], scope)


@pytest.mark.parametrize("prefill", [Prefill.full, Prefill.stream])
def test_decoding_agrees_with_the_closed_loop(trace: Trace, prefill: Prefill) -> None:
    """A latent vector goes when the layer evicts its key: the cache is as short as the budget says."""
    found = compile_verify(trace, ["h2o", "tova", "a2sf"], "6", VerifyOptions(prefill=prefill)).execute()
    assert [verdict.label for verdict in found] == ["h2o [per layer]", "tova", "a2sf [per layer]"]
    for verdict in found:
        assert verdict.agrees and verdict.largest_cache == 6, verdict


def test_entries_are_in_the_table_the_report_and_comparisons(trace: Trace, tmp_path: Path) -> None:
    made = replayed(trace, tmp_path / "r", ["h2o", "keydiff"])
    table = columns(made.summary.runs, made.summary.metrics)
    shown = {column.header: column.cells for column in table}
    assert shown["latent\nentries"] == [f"{entries(made, 0):.1f}", f"{entries(made, 1):.1f}"]
    assert shown["decides"] == ["layer", "kv head"] and shown["latent\nbytes"][0].endswith(" bytes")
    (note,) = [column.note for column in table if column.header == "latent\nentries"]
    assert note.startswith("Latent entries: the vectors")
    assert SUMMARY.plain(made.summary)["runs"][0]["metrics"]["latent_entries"]["mean"] == entries(made, 0)
    found = by_sequence(made, [0, 1], ["latent_entries", "latent_bytes"])
    assert found[1, "latent_entries"] == {0: pytest.approx(entries(made, 1))}
    assert found[1, "latent_bytes"] == {0: pytest.approx(entries(made, 1) * 24 * 2 * 3)}
    source = ReportInput((made,), {trace.identity: trace})
    assert {"latent_entries", "latent_bytes"} <= set(overview(source)["usual"])
    assert [run.marks[:1] for run in source.runs] == [["decides per layer"], ["decides per kv head"]]
    (values,) = [run["values"] for run in page_data(source)["runs"] if run["policy"] == "keydiff"]
    assert values["latent_entries"][0] == pytest.approx(entries(made, 1), rel=1e-3)


def test_text_is_scored_with_the_same_default(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(PROMPT)
    model = ModelSource(str(saved(tmp_path / "model", "deepseek_v3")))
    job = compile_perplexity(model, [tmp_path / "text.txt"], ["h2o"], "6")
    made = job.execute(OutputOptions(tmp_path / "r"))
    assert [run.label for run in made.info.runs] == ["h2o [per layer]"]
    assert made.summary.runs[0].mean("latent_entries") == pytest.approx(made.summary.runs[0].mean("held_keys"))


def test_a_search_decides_as_a_replay_does(tmp_path: Path) -> None:
    several = recorded(tmp_path, "deepseek_v3", prompts=2)
    grid = {"alpha": ["0.1", "0.9"]}
    found = compile_tune([several], "a2sf", grid, "6", TuneOptions(level=TuneLevel.model)).execute()
    made = compile_replay(several, [f"a2sf:alpha={alpha}" for alpha in grid["alpha"]], "6")
    means = by_sequence(made.execute(OutputOptions(tmp_path / "r")), [0, 1], ["retained_mass"])
    best = max((0, 1), key=lambda number: means[number, "retained_mass"][0])
    assert found.searched["best"] == [pytest.approx(means[best, "retained_mass"][0], abs=1e-6)]
    with pytest.raises(UsageError, match=r"a2sf.* decides per layer"):
        compile_tune([several], "a2sf", grid, "6", TuneOptions(level=TuneLevel.head))


def test_other_models_have_none(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "llama")
    made = compile_replay(trace, ["h2o"], "6").execute(OutputOptions(tmp_path / "r"))
    assert trace.header.latent_size is None and trace.approximate == []
    assert "latent_entries" not in made.summary.metrics and made.info.runs[0].label == "h2o"


def test_values_of_another_size_than_keys_are_read(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "deepseek_v3", StoreOptions("maps+vectors"))
    assert (trace.header.head_dim, trace.header.value_dim) == (16, 8)
    queries, keys, values = trace.states(0, 1)
    assert (queries.shape, keys.shape, values.shape) == ((4, 30, 16), (4, 30, 16), (4, 30, 8))
    assert np.allclose(trace.value_norms(0, 1), np.abs(values).sum(-1), rtol=1e-5)
    made = compile_replay(trace, ["vatp"], "6").execute(OutputOptions(tmp_path / "r"))
    assert made.fidelity()["output_error"].notna().any()
