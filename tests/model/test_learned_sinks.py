"""Learned sinks: what is stored of a row, and that figures do not depend on what a model's own code returns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.core.options import ModelSource, OutputOptions, ReplayOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model import compile as recording
from kvscope.model.compile import compile_recording
from kvscope.model.loading import load
from kvscope.replay.compile import compile_replay
from kvscope.trace.importer import import_maps
from kvscope.trace.reader import Trace
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(24))
OF_OUTPUTS = {"output_error", "ideal_cosine_flattened"}  # they weigh a row by what is left of it
TYPES = ("granite_swa", "granitemoe_swa", "gpt_oss")


def recorded(folder: Path, output: Path) -> Trace:
    prompt = output.with_suffix(".txt")
    prompt.write_text(PROMPT)
    text = TextOptions(max_new_tokens=4)
    return compile_recording(ModelSource(str(folder)), [prompt], OutputOptions(output), text=text).execute()


def figures(trace: Trace, output: Path) -> dict[str, Any]:
    """Return the mean of every metric of policies whose decisions do not depend on weights."""
    made = compile_replay(trace, ["streaming-llm:sinks=2", "window"], "9", ReplayOptions()).execute(
        OutputOptions(output)
    )
    return {f"{run.label} {name}": value.mean for run in made.summary.runs for name, value in run.metrics.items()}


def own_rows(folder: Path, trace: Trace) -> list[np.ndarray]:
    """Return the rows ``[H, T, T]`` of each layer that the model's own eager code returns."""
    model = load(ModelSource(str(folder))).model
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))[None]
    with torch.inference_mode():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    return [one[0].float().numpy() for one in maps]


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_stored_after_the_share_of_the_sink(name: str, tmp_path: Path) -> None:
    """gpt-oss returns such rows, Granite those before the share; the trace has the same of both."""
    folder = saved(tmp_path / "model", name)
    trace = recorded(folder, tmp_path / "trace")
    assert (trace.header.learned_sinks, trace.header.sink_rows) == (True, "after")
    for layer, own in zip(trace.layers, own_rows(folder, trace), strict=True):
        sums = trace.row_sums(0, layer)
        assert sums.max() < 1 and sums.min() < 0.9
        assert np.allclose(own.sum(-1), sums if name == "gpt_oss" else 1, atol=2e-3)
        left = own if name == "gpt_oss" else own * sums[..., None]
        assert np.allclose(trace.attention(0, layer), left, atol=1e-3)


def test_figures_are_the_same_whichever_rows_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, recorded after the share, before it, and imported from before it with the share."""
    folder = saved(tmp_path / "model", "granite_swa")
    after = recorded(folder, tmp_path / "after")
    rows, shares = own_rows(folder, after), [1 - after.row_sums(0, layer) for layer in after.layers]
    values = np.random.default_rng(0).normal(size=(3, 2, after.sequences[0].length, 8))
    common = {"values": values, "prompt_length": np.array(after.sequences[0].prompt)}

    def imported(name: str, **arrays: Any) -> Trace:
        file = tmp_path / f"{name}.npz"
        np.savez(file, **common, **arrays)
        return import_maps(file, None, tmp_path / name, learned_sinks=True)

    left = [row * (1 - share)[..., None] for row, share in zip(rows, shares, strict=True)]
    want = figures(imported("left", attention=np.stack(left)), tmp_path / "r0")
    with_share = imported("with_share", attention=np.stack(rows), sink_mass=np.stack(shares))
    assert figures(with_share, tmp_path / "r1") == pytest.approx(want, abs=1e-3)
    unknown = imported("unknown", attention=np.stack(rows))
    assert unknown.header.sink_rows == "before"
    got = figures(unknown, tmp_path / "r2")
    shared = {name for name in want if name.split()[-1] not in OF_OUTPUTS}
    assert len(shared) > 8
    assert {name: got[name] for name in shared} == pytest.approx({name: want[name] for name in shared}, abs=1e-3)
    monkeypatch.setattr(recording, "obstacle", lambda model: "made to be observed at its modules")
    modules = recorded(folder, tmp_path / "before")
    assert (modules.header.rows_from, modules.header.learned_sinks) == ("module", False)
    assert modules.header.sink_rows == "before"
    for layer, own in zip(modules.layers, rows, strict=True):
        assert np.allclose(modules.attention(0, layer), own, atol=1e-3)


def test_a_model_without_sinks_says_nothing(tmp_path: Path) -> None:
    assert recorded(saved(tmp_path / "model", "llama"), tmp_path / "trace").header.sink_rows is None
