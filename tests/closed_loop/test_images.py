"""The closed loop, its perplexity and real decoding read the recorded images again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvscope
from kvscope.closed_loop.compile import compile_verify
from kvscope.closed_loop.trace_images import images_of
from kvscope.core.errors import KvscopeError
from kvscope.core.options import (
    ClosedLoopOptions,
    ModelSource,
    OutputOptions,
    Positions,
    Prefill,
    ReplayOptions,
    VerifyOptions,
)
from kvscope.model.loading import load
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay

pytest.importorskip("PIL")
from tests.models.multimodal import PLACES, picture, saved, words

KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3")
POLICIES = ("h2o", "tova", "streaming-llm:sinks=2")


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kvscope.Trace]:
    base = tmp_path_factory.mktemp("multimodal")
    made = {}
    for kind in KINDS:
        (folder := base / kind).mkdir()
        picture(folder / "a.png", 24, 16)
        picture(folder / "b.png", 24, 32, 1)
        place = PLACES[kind]
        entries = [
            {"prompt": f"{words(0, 5)} {place} {words(9, 6)} {place} {words(40, 4)}", "images": ["a.png", "b.png"]},
            {"prompt": words(20, 12)},
        ]
        prompts = folder / "p.jsonl"
        prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        model = saved(folder / "model", kind)
        made[kind] = kvscope.trace(str(model), [prompts], output=folder / "trace", max_new_tokens=8)
    return made


def closed(trace: kvscope.Trace, output: Path, **options: Any) -> Replay:
    chosen = ReplayOptions(closed=ClosedLoopOptions(), metrics=("retained_mass",), **options)
    return compile_replay(trace, ["full", *POLICIES], "12", chosen).execute(OutputOptions(output))


@pytest.mark.parametrize("prefill", list(Prefill))
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_loop(kind: str, prefill: Prefill, traces: dict[str, kvscope.Trace], tmp_path: Path) -> None:
    replay = closed(traces[kind], tmp_path / "closed", prefill=prefill)
    tokens = replay.tokens()
    run_of = {run.label: run.run for run in replay.info.runs if run.loop == "closed"}
    full = tokens[tokens["run"] == run_of["full"]]
    recorded = traces[kind].tokens(0)["logprob"]
    mine = full[full["sequence"] == 0].set_index("position")["nll_full"]
    assert len(mine) and (mine + recorded[mine.index]).abs().max() < 1e-3, "the images are those that were recorded"
    assert full["kl"].max() < 1e-6
    assert tokens[tokens["run"] == run_of["tova"]]["kl"].max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_verify(kind: str, traces: dict[str, kvscope.Trace]) -> None:
    verdicts = compile_verify(traces[kind], POLICIES, "12", VerifyOptions(sequences=2)).execute()
    assert {one.sequence for one in verdicts} == {0, 1}
    assert all(one.agrees for one in verdicts), [(one.label, one.different, one.logit_difference) for one in verdicts]


def test_the_place_of_an_image_is_not_in_the_identity(tmp_path: Path) -> None:
    made = []
    model = saved(tmp_path / "model", "llava")
    for name in ("here", "there"):
        (folder := tmp_path / name).mkdir()
        picture(folder / "a.png", seed=3)
        (folder / "p.jsonl").write_text(json.dumps({"prompt": f"w1 {PLACES['llava']}", "images": ["a.png"]}))
        made.append(kvscope.trace(str(model), [folder / "p.jsonl"], output=folder / "trace", max_new_tokens=2))
    assert made[0].identity == made[1].identity


def test_a_budget_that_depends_on_all_layers(traces: dict[str, kvscope.Trace]) -> None:
    trace = traces["qwen2_5_vl"]
    assert all(
        one.agrees for one in compile_verify(trace, ["ada-kv", "cake"], "12", VerifyOptions(sequences=2)).execute()
    )


def refusal(trace: kvscope.Trace, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(KvscopeError) as caught:
        closed(trace, tmp_path / "closed", **options)
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def test_images_that_changed(traces: dict[str, kvscope.Trace], tmp_path: Path) -> None:
    trace = traces["llava"]
    file = Path(trace.record.sequences[0].images[1].file)
    before = file.read_bytes()
    try:
        picture(file, 24, 32, 7)
        assert "image 2" in (said := refusal(trace, tmp_path)) and "was changed since it was recorded" in said
        file.unlink()
        assert "No such file" in (said := refusal(trace, tmp_path)) and "in the open loop" in said
    finally:
        file.write_bytes(before)
    compile_replay(trace, POLICIES, "12", ReplayOptions()).execute(OutputOptions(tmp_path / "open"))


def test_what_is_refused(traces: dict[str, kvscope.Trace]) -> None:
    trace, loaded = traces["llava"], load(ModelSource(str(traces["llava"].header.model.id)))
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))
    ids[-1] = loaded.model.config.image_token_index
    with pytest.raises(KvscopeError, match="the model generated tokens that stand for images"):
        images_of(trace, loaded, 0, ids)
    with pytest.raises(KvscopeError, match="cannot be decoded token by token"):
        compile_verify(traces["llava"], POLICIES, "12", VerifyOptions(prefill=Prefill.stream))
    with pytest.raises(KvscopeError, match="cannot be compacted in prompts with images"):
        compile_verify(
            traces["llava"], ["tova"], "12", VerifyOptions(closed=ClosedLoopOptions(positions=Positions.compacted))
        )
