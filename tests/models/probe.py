"""What happens to a type of model: traced, compared with eager attention, replayed in both loops, verified."""

from __future__ import annotations

import re
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
from kvscope.model.module_maps import observe_modules, sources
from kvscope.model.obstacles import obstacle
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace
from tests.models.build import needs_timm, saved, without_timm

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
    latent: bool = False  # the heads of a layer share one cached vector
    indexed: bool = False  # a learned index chooses what a query sees
    shares: bool = False  # its configuration can let layers share a cache
    timm: bool = False  # its image encoder is built by the package timm
    model_differs: float | None = None  # the model's own decoding from its own pass over the text
    logits_differ: float | None = None  # real decoding from the closed loop, at most
    decisions_differ: bool = False  # keys that are evicted in real decoding, from those of the closed loop
    message: str = ""

    @property
    def crashed(self) -> bool:
        """Whether something was raised that is no error of kvscope's own."""
        return "crash" in (self.trace, self.replay, self.closed, self.verify)


def probe(name: str, folder: Path) -> dict[str, Any]:
    """Return what happens to a type, with all files in `folder`, which is empty."""
    with without_timm():
        return _probe(name, folder)


def _probe(name: str, folder: Path) -> dict[str, Any]:
    result = Result(timm=needs_timm(name))
    model = folder / "model"
    if _stage(result, "trace", lambda: saved(model, name), crash="not built") is None:
        return asdict(result)
    trace = _stage(result, "trace", lambda: _traced(model, folder / "trace"))
    if trace is None:
        return asdict(result)
    result.layers, result.others = len(trace.layers), ", ".join(sorted(set(trace.header.other_layers.values())))
    result.latent, result.indexed = trace.header.latent_size is not None, trace.header.indexed
    result.shares = hasattr(type(load(ModelSource(str(model))).text_config), "kv_sharing_modes")
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
            result.decisions_differ = True
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
        if trace.header.learned_sinks:  # some types return rows before the factor of the sink
            rows, maps = [_shares(one) for one in rows], [_shares(one) for one in maps]
        pairs = zip(rows, maps, strict=True)
        worst.append(max(float(np.abs(mine - given[:, start:stop, :stop]).max(initial=0)) for mine, given in pairs))
    return worst[0], worst[1]


def _shares(rows: Any) -> Any:
    """Return rows that sum to one."""
    return rows / rows.sum(-1, keepdims=True)


def _maps(model: Any, ids: torch.Tensor, trace: Trace) -> list[Any]:
    """Return the rows ``[H, T, T]`` of each recorded layer that eager attention gives in one pass."""
    with torch.inference_mode():
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    if not maps:  # the model does not pass on what its modules return
        found: dict[int, torch.Tensor] = {}
        with torch.inference_mode(), observe_modules(sources(model, ids), found.__setitem__):
            model(input_ids=ids, use_cache=False, output_attentions=True)
        maps = [found[layer] for layer in trace.layers]
    maps = [one[0].float().numpy() for one in maps if one is not None and one.ndim == 4]
    if len(maps) == trace.header.n_layers:
        maps = [maps[layer] for layer in trace.layers]
    if len(maps) != len(trace.layers):
        raise ValueError(f"eager attention returns {len(maps)} maps, the trace has layers {trace.layers}")
    return maps


def record_of(result: dict[str, Any]) -> dict[str, str]:
    """Return the entry of a type in ``types.json``: what works with it, in words, and why something does not."""
    if "does not run on a text prompt" in result["message"] and not re.search(NEEDS_IMAGES, result["message"]):
        return {**dict.fromkeys(("replay", "closed", "verify"), "-"), "trace": "not tried", "remark": UNTRIED}
    traced = {"ok": "rows", "maps": "module rows", "not built": "not tried"}
    return {
        "trace": traced.get(result["trace"], result["trace"]),
        "replay": _WORDS.get(result["replay"], result["replay"]),
        "closed": _WORDS.get(result["closed"], result["closed"]),
        "verify": {"refused": "no"}.get(result["verify"], result["verify"]),
        "remark": "; ".join(_remarks(result)),
    }


NEEDS_IMAGES = "pixel_values|image_embeds"
UNTRIED = "no tiny configuration of it is known that runs"
_WORDS = {"ok": "yes", "refused": "no"}
FACTS = {
    "latent": "one latent cache for the heads of a layer",
    "indexed": "its own choice is the policy indexer",
    "shares": "layers can share a cache",
    "timm": "needs the package timm",
}
SAME = 1e-4  # above this, logits of a model's own decoding and of its own pass are not the same


def _remarks(result: dict[str, Any]) -> list[str]:
    said = dict(re.findall(r"^\[(\w+)\] (.*)$", result["message"], re.MULTILINE))
    said = {stage: re.sub(r"\S*/(model|trace|prompt)\b", r"the \1", line) for stage, line in said.items()}
    said = {stage: re.sub(r" by \S+ nats per token", "", line) for stage, line in said.items()}
    if result["trace"] == "not built":
        missing = re.findall(r"requires the (\w+) library", result["message"])
        return [f"needs {' and '.join(dict.fromkeys(missing))}" if missing else UNTRIED]
    if result["trace"] != "ok" and result["trace"] != "maps":
        return [said.get("trace", "")]
    found = []
    if result["others"]:
        found.append(
            f"no cache to evict in its {result['others']} layers".replace("no attention layers", "other layers")
        )
    if result["why"]:
        found.append(result["why"].partition(" ")[2])
    else:
        found += [
            said[stage] for stage in ("replay", "closed", "verify") if result.get(stage) == "refused" and stage in said
        ]
    found += [words for fact, words in FACTS.items() if result.get(fact)]
    if (result["model_differs"] or 0) > SAME:
        found.append("decodes to other logits than its own pass over the text gives")
    elif result["verify"] == "differs" and not result["decisions_differ"] and result["logits_differ"] < 1e-7:
        found.append(
            "decides as decoding does; a part in float32 may round otherw"
            "ise where keys are evicted, by 1e-8 in the logits"
        )
    return found
