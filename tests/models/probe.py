"""What happens to a type of model: traced, compared with eager attention, replayed in both loops, verified."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvscope.closed_loop.compile import compile_verify
from kvscope.core.errors import KvscopeError
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, ReplayOptions, VerifyOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.loading import load
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))
NEW, BUDGET = 10, "9"
POLICIES = ("h2o", "streaming-llm:sinks=2")
ROUNDING = 1e-3  # a float16 weight beside a float32 one


@dataclass
class Result:
    """One type: ``ok`` or what was said in each stage, and the numbers that were measured."""

    trace: str = "-"
    replay: str = "-"
    closed: str = "-"
    verify: str = "-"
    rows_differ: float | None = None  # from eager attention, at most
    layers: int | None = None  # recorded
    logits_differ: float | None = None  # real decoding from the closed loop, at most
    message: str = ""

    @property
    def crashed(self) -> bool:
        """Whether something was raised that is no error of kvscope's own."""
        return "crash" in (self.trace, self.replay, self.closed, self.verify)


def probe(name: str, folder: Path) -> dict[str, Any]:
    """Return what happens to a type, with all files in `folder`, which is empty."""
    result = Result()
    model = folder / "model"
    if _stage(result, "trace", lambda: saved(model, name), crash="not built") is None:
        return asdict(result)
    trace = _stage(result, "trace", lambda: _traced(model, folder / "trace"))
    if trace is None:
        return asdict(result)
    result.layers = len(trace.layers)
    result.rows_differ = _stage(result, "trace", lambda: _difference(name, model, trace))
    if result.rows_differ is not None:
        result.trace = "ok" if result.rows_differ <= ROUNDING else "differs"
    if _stage(result, "replay", lambda: _replayed(trace, folder / "open", None)):
        result.replay = "ok"
    if _stage(result, "closed", lambda: _replayed(trace, folder / "closed", ClosedLoopOptions())):
        result.closed = "ok"
    verdicts = _stage(result, "verify", lambda: compile_verify(trace, POLICIES, BUDGET, VerifyOptions()).execute())
    if verdicts is not None:
        result.verify = "equal" if all(one.agrees for one in verdicts) else "differs"
        result.logits_differ = max(one.logit_difference for one in verdicts)
        if any(one.different for one in verdicts):
            result.message += f"[verify] {sum(one.different for one in verdicts)} decisions differ\n"
    return asdict(result)


def _stage(result: Result, stage: str, run: Callable[[], Any], crash: str = "crash") -> Any:
    try:
        return run()
    except KvscopeError as error:
        setattr(result, stage, "refused")
        if str(error) not in result.message:
            result.message += f"[{stage}] {error}\n"
    except Exception as error:
        setattr(result, stage, crash)
        where = [line.strip() for line in traceback.format_exc().splitlines() if line.strip().startswith("File")]
        result.message += f"[{stage}] {type(error).__name__}: {str(error)[:300]} @ {' < '.join(where[-3:])[-400:]}\n"
    return None


def _traced(model: Path, output: Path) -> Trace:
    prompt = output.parent / "prompt.txt"
    prompt.write_text(PROMPT)
    text = TextOptions(max_new_tokens=NEW)
    return compile_recording(ModelSource(str(model)), [prompt], OutputOptions(output), text=text).execute()


def _replayed(trace: Trace, output: Path, closed: ClosedLoopOptions | None) -> bool:
    job = compile_replay(trace, POLICIES, BUDGET, ReplayOptions(closed=closed, metrics=("retained_mass",)))
    job.execute(OutputOptions(output))
    return True


def _difference(name: str, folder: Path, trace: Trace) -> float:
    """Return the largest difference of recorded weights from those that the model returns with eager attention."""
    model = load(ModelSource(str(folder))).model
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))[None]
    with torch.inference_mode():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    maps = [one for one in maps if one is not None and one.ndim == 4]
    if len(maps) != len(trace.layers) and len(maps) != trace.header.n_layers:
        raise ValueError(f"eager attention returns {len(maps)} maps, the trace has layers {trace.layers}")
    if len(maps) != len(trace.layers):
        maps = [maps[layer] for layer in trace.layers]
    worst = 0.0
    for layer, expected in zip(trace.layers, maps, strict=True):
        rows = np.asarray(trace.attention(0, layer), dtype=np.float32)
        seen = expected[0].float().numpy()[..., -rows.shape[1] :, -rows.shape[2] :]
        worst = max(worst, float(np.abs(rows - seen).max()))
    return worst
