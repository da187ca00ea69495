"""Latent caches (DeepSeek): the entries that must be held are the union over the heads."""

from pathlib import Path

import numpy as np

from kvscope.cli.summary import latent
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import StoreOptions, TextOptions
from kvscope.model.compile import compile_recording
from kvscope.replay.compile import compile_replay
from kvscope.results.latent import latent_held
from kvscope.trace.reader import Trace
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))


def recorded(folder: Path, name: str, store: StoreOptions = StoreOptions()) -> Trace:  # noqa: B008  frozen
    (folder / "prompt.txt").write_text(PROMPT)
    model = ModelSource(str(saved(folder / "model", name)))
    output, text = OutputOptions(folder / "trace"), TextOptions(max_new_tokens=10)
    return compile_recording(model, [folder / "prompt.txt"], output, text=text, store=store).execute()


def test_entries_are_the_union_over_heads(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "deepseek_v3")
    assert (trace.header.latent_size, trace.kv_heads) == (24, 4)
    made = compile_replay(trace, ["h2o", "a2sf", "snapkv", "streaming-llm:sinks=2", "ideal"], "6").execute(
        OutputOptions(tmp_path / "r")
    )
    assert any(
        line.startswith("Latent cache: the heads of a layer share one vector of 24") for line in trace.approximate
    )
    sequence, more = trace.sequences[0], []
    for run in made.info.runs:
        held = latent_held(made, run)
        if run.reads:
            assert held is None
            continue
        masks = [made.resident(run.run, 0, layer)[:, sequence.prompt :] for layer in trace.layers]  # [G, steps, T]
        assert held is not None
        assert np.isclose(held.entries, np.mean([mask.any(0).sum(-1) for mask in masks]))
        assert np.isclose(held.keys, np.mean([mask.sum(-1) for mask in masks]))
        assert np.isclose(held.bytes, held.entries * 24 * 2 * 3)
        if run.scope == "layer":
            assert np.isclose(held.entries, held.keys), run.label
        more.append(held.entries - held.keys)
    assert min(more) > -1e-9 and max(more) > 0.1, "heads that keep different keys hold more entries than keys"
    assert len(latent(made)) == sum(not run.reads for run in made.info.runs) >= 2


def test_other_models_have_none(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "llama")
    made = compile_replay(trace, ["h2o"], "6").execute(OutputOptions(tmp_path / "r"))
    assert trace.header.latent_size is None and latent(made) == [] and trace.approximate == []


def test_values_of_another_size_than_keys_are_read(tmp_path: Path) -> None:
    trace = recorded(tmp_path, "deepseek_v3", StoreOptions("maps+vectors"))
    assert (trace.header.head_dim, trace.header.value_dim) == (16, 8)
    queries, keys, values = trace.states(0, 1)
    assert (queries.shape, keys.shape, values.shape) == ((4, 30, 16), (4, 30, 16), (4, 30, 8))
    assert np.allclose(trace.value_norms(0, 1), np.abs(values).sum(-1), rtol=1e-5)
    made = compile_replay(trace, ["vatp"], "6").execute(OutputOptions(tmp_path / "r"))
    assert made.fidelity()["output_error"].notna().any()
