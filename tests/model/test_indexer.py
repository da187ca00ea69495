"""Models with a learned index (DeepSeek-V3.2): what the index chooses is recorded, and is a policy."""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from kvscope.core.errors import TraceError, UsageError
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, ReplayOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.module_maps import LEAST, MapRecorder
from kvscope.replay.compile import compile_replay
from kvscope.report.source import ReportInput
from kvscope.trace.reader import Trace
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(24))


def recorded(model: Path, place: Path) -> Trace:
    place.mkdir(exist_ok=True)
    (place / "prompt.txt").write_text(PROMPT)
    output, text = OutputOptions(place / "trace"), TextOptions(max_new_tokens=10)
    return compile_recording(ModelSource(str(model)), [place / "prompt.txt"], output, text=text).execute()


@contextmanager
def overheard(name: str) -> Iterator[dict[int, list[set[int]]]]:
    """Yield what the indexer of each layer chooses for single tokens, in order."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    (indexer,) = [part for key, part in vars(module).items() if key.endswith("Indexer")]
    found: dict[int, list[set[int]]] = defaultdict(list)
    plain = indexer.forward

    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        indices: Tensor = plain(self, hidden, *args, **kwargs)
        if hidden.shape[1] == 1:
            found[self.layer_idx].append(set(indices[0, 0].tolist()))
        return indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "forward", forward)
        yield found


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "axk2"])
def test_the_policy_reads_what_the_index_chose(name: str, tmp_path: Path) -> None:
    """As the model decoded: its scores tie, so that a pass over the whole text chooses other keys."""
    folder = saved(tmp_path / "model", name)
    with overheard(name) as picks:
        trace = recorded(folder, tmp_path / "recorded")
    assert trace.header.indexed and trace.header.latent_size == 24
    assert any(line.startswith("Learned index: a query of this model sees") for line in trace.approximate)
    made = compile_replay(trace, ["indexer", "h2o"], "4,8").execute(OutputOptions(tmp_path / "replay"))
    assert [(run.label, run.budget) for run in made.info.runs] == [
        ("indexer", None),
        ("h2o [per layer]", "4"),
        ("h2o [per layer]", "8"),
    ]
    assert sorted(picks) == trace.layers
    sequence, topk = trace.sequences[0], AutoConfig.from_pretrained(folder).index_topk
    for layer, of_layer in picks.items():
        read = made.visible(0, 0, layer)
        assert len(of_layer) in (sequence.length - sequence.prompt, sequence.length - sequence.prompt - 1)
        for t, indices in enumerate(of_layer, sequence.prompt):
            assert len(indices) == topk
            assert all(set(np.flatnonzero(head).tolist()) == indices | {t} for head in read[:, t]), (layer, t)
    summary = made.summary.runs
    assert summary[0].mean("retained_mass") == 1.0
    assert topk <= (summary[0].mean("read_keys") or 0) <= topk + 1
    assert 0 < (summary[1].mean("retained_mass") or 0) < (summary[2].mean("retained_mass") or 0) < 1
    assert ReportInput((made,), {trace.identity: trace}).runs[0].kind == "reads a part"


def test_other_models_and_the_closed_loop_have_no_choice(tmp_path: Path) -> None:
    trace = recorded(saved(tmp_path / "model", "llama"), tmp_path / "llama")
    assert not trace.header.indexed
    with pytest.raises(TraceError, match="indexer needs a model that selects the keys it reads"):
        compile_replay(trace, ["indexer"], "8")
    job = compile_replay(trace, ["indexer", "h2o"], "8", ReplayOptions(skip_unsupported=True))
    assert list(job.skipped) == ["indexer"]
    with pytest.raises((TraceError, UsageError), match="indexer"):
        compile_replay(trace, ["indexer"], "8", ReplayOptions(closed=ClosedLoopOptions()))


class Written:
    """A pipeline and a writer that keep what they are given."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def put(self, _: object, __: object, parts: dict[str, Tensor]) -> None:
        self.rows.append(parts["rows"])

    def attention(self, *_: object, **__: object) -> None: ...


@pytest.mark.parametrize("indexed", [True, False])
def test_no_weight_of_a_chosen_key_is_rounded_to_zero(indexed: bool) -> None:
    """Float16 has no number between zero and 6e-8; a key of less weight was chosen all the same."""
    written: Any = Written()
    recorder = MapRecorder(written, [0], 4, heads=(), query_stride=1, indexed=indexed, pipeline=written)
    recorder.begin(0)
    rows = torch.tensor([[[[1.0, 0, 0], [1.0, 1e-30, 0], [0.5, 0, 0.5]]]])
    recorder(0, rows)
    (half,) = written.rows
    assert half.dtype == torch.float16
    assert half[0, 1, 1] == (LEAST if indexed else 0) and LEAST > 0
    assert torch.equal(half == 0, rows[0] == 0) == indexed
