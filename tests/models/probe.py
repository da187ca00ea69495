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
from kvscope.model.attention_hook import obstacle
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
    rows_differ: float | None = None  # of the prompt, from eager attention in one pass, at most
    decoded_rows_differ: float | None = None  # the same of rows that were decoded with a cache
    layers: int | None = None  # recorded
    others: str = ""  # kinds of the layers without attention
    why: str = ""  # only the rows of modules can be recorded
    model_differs: float | None = None  # the model's own decoding from its own pass over the text
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
    result.layers, result.others = len(trace.layers), ", ".join(sorted(set(trace.header.other_layers.values())))
    result.why = obstacle(load(ModelSource(str(model))).model) if trace.header.rows_from else ""
    differ = _stage(result, "trace", lambda: _differences(model, trace))
    if differ is not None:
        result.rows_differ, result.decoded_rows_differ = differ
        result.trace = ("maps" if trace.header.rows_from else "ok") if differ[0] <= ROUNDING else "differs"
    if _stage(result, "replay", lambda: _replayed(trace, folder / "open", None)):
        result.replay = "ok"
    if _stage(result, "closed", lambda: _replayed(trace, folder / "closed", ClosedLoopOptions())):
        result.closed = "ok"
    verdicts = _stage(result, "verify", lambda: compile_verify(trace, POLICIES, BUDGET, VerifyOptions()).execute())
    if verdicts is not None:
        result.verify = "equal" if all(one.agrees for one in verdicts) else "differs"
        result.model_differs = max(one.model_difference for one in verdicts)
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


def _differences(folder: Path, trace: Trace) -> tuple[float, float]:
    """Return the largest difference of recorded weights from those of one eager pass, in the prompt and after it."""
    model = load(ModelSource(str(folder))).model
    if not trace.header.rows_from:
        model.set_attn_implementation("eager")
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))[None]
    prompt = trace.sequences[0].prompt
    worst = []
    for start, stop in ((0, prompt), (prompt, ids.shape[1])):
        maps = _maps(model, ids[:, :stop], trace)
        rows = [np.asarray(trace.attention(0, layer, start, stop), dtype=np.float32) for layer in trace.layers]
        pairs = zip(rows, maps, strict=True)
        worst.append(max(float(np.abs(mine - given[:, start:stop, :stop]).max(initial=0)) for mine, given in pairs))
    return worst[0], worst[1]


def _maps(model: Any, ids: torch.Tensor, trace: Trace) -> list[Any]:
    """Return the rows ``[H, T, T]`` of each recorded layer that eager attention gives in one pass."""
    with torch.inference_mode():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    maps = [one[0].float().numpy() for one in maps if one is not None and one.ndim == 4]
    if len(maps) == trace.header.n_layers:
        maps = [maps[layer] for layer in trace.layers]
    if len(maps) != len(trace.layers):
        raise ValueError(f"eager attention returns {len(maps)} maps, the trace has layers {trace.layers}")
    return maps
