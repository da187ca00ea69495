"""What `gpu.py` measures: the closed loop, decoding, tracing, replaying, and whether a GPU decides as the CPU does."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from closed_loop import EIGHT, closed, generate, memory_of, plans, real, synchronize, timed
from sections import ratio, side_by_side, summary
from shapes import random_model
from trace_cost import KINDS, action, recorded

import kvscope
from kvscope.closed_loop.forward import GPU_BLOCK_QUERIES
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, OutputOptions, Prefill, ReplayOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape
from kvscope.engine.runs import runs_of
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.metrics import METRICS
from kvscope.model.loading import Loaded
from kvscope.policies.base import POLICIES
from kvscope.policies.spec import parse_policies
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace, open_trace

EXAMPLE = Path(__file__).parents[1] / "traces" / "example"
REPLAYED = ["h2o", "a2sf", "tova"]
EIGHT_BUDGETS = "5%,10%,15%,20%,25%,30%,40%,50%"
GENERATED = 32  # tokens from which the time of one token is computed
DECODED = 32  # tokens of the first and shortest decoding under a policy
STEPS = 64  # steps in a block of random rows
BALLS = 64  # the weights of a random row with ties are multiples of one over this


class Bench:
    """The model under measurement, one at a time, and a folder for traces.

    Parameters
    ----------
    device : str
        Where to measure.
    folder : Path
        Temporary folder for traces and replays.
    rounds : int
        Most rounds of each measurement.
    traced : tuple of int
        Tokens of the prompt, and new tokens, of a tracing.
    layers : int
        Layers of the trace that is replayed on the CPU too.
    """

    def __init__(self, device: str, folder: Path, rounds: int, traced: tuple[int, int], layers: int) -> None:
        self.device, self.folder, self.rounds, self.traced, self.layers = device, folder, rounds, traced, layers
        self._shape, self._loaded = "", None
        self._replays = 0

    def loaded(self, shape: str) -> Loaded:
        """Return the model of a shape; that of another shape is dropped first."""
        if self._shape != shape or self._loaded is None:
            self._loaded = None
            if self.device.startswith("cuda"):
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            self._loaded = Loaded(random_model(shape, self.device), None, f"random {shape}", "made here", None)
            self._shape = shape
        self._loaded.model.set_attn_implementation("sdpa")
        return self._loaded

    def ids(self, shape: str, tokens: int) -> torch.Tensor:
        """Return random tokens ``[T]``, the same every time."""
        vocabulary = self.loaded(shape).model.config.vocab_size
        drawn = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
        return drawn.to(self.device)

    def measure(self, work: dict[str, Callable[[], object]], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the seconds of each kind, and figures: seconds, rounds, peak memory. The first run is a warm-up."""
        start = time.monotonic()
        memory = {name: memory_of(run, self.device) for name, run in work.items()}
        left = seconds - (time.monotonic() - start)
        took = side_by_side(work, left, self.rounds, partial(timed, device=self.device))
        figures = {"rounds": len(next(iter(took.values()))), "peak_mib_above_model": memory}
        return took, figures | {"seconds": {name: summary(values) for name, values in took.items()}}

    def replay(self, trace: Trace, device: str) -> None:
        """Replay 24 pairs of policy and budget with all metrics."""
        self._replays += 1
        output = self.folder / f"replay-{self._replays}"
        kvscope.replay(trace, REPLAYED, EIGHT_BUDGETS, output=output, prefill="stream", device=device)
        synchronize(self.device)
        shutil.rmtree(output)


def closed_loop(bench: Bench, shape: str, tokens: int, eight: bool, seconds: float) -> dict[str, Any]:
    """Measure the closed loop of one run, or of eight, beside a forward pass and plain generation."""
    model, ids = bench.loaded(shape).model, bench.ids(shape, tokens)
    names, budgets = (EIGHT, "20%,40%") if eight else (["h2o"], "20%")
    runs = runs_of(plans(names), parse_budgets(budgets), Loop.closed)
    metrics = [METRICS.get(name) for name in METRICS.names()]
    prompt = ids[: tokens // 2][None]  # the cache of a token is half full on average

    def tokens_after(new: int) -> None:
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    work: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(model, ids),
        "closed": lambda: closed(model, ids, runs),
        "closed_metrics": lambda: closed(model, ids, runs, metrics),
        "generate_1": lambda: tokens_after(1),
        "generate_more": lambda: tokens_after(1 + GENERATED),
    }
    took, figures = bench.measure(work, seconds)
    pairs = zip(took["generate_more"], took["generate_1"], strict=True)
    per_token = [max(more - one, 1e-9) / GENERATED for more, one in pairs]
    whole = [tokens * each for each in per_token]
    ratios = {
        f"{name}_over_{other}": ratio(took[name], whole if other == "generate" else took[other])
        for name in ("closed", "closed_metrics")
        for other in ("forward", "generate")
    }
    ratios["metrics_over_none"] = ratio(took["closed_metrics"], took["closed"])
    about = {"policies": names, "budgets": budgets, "runs": len(runs), "generate": f"of {tokens} tokens, extrapolated"}
    return figures | about | {"generate_seconds_per_token": summary(per_token), "ratios": ratios}


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor) -> None:
    """Run one forward pass without a cache."""
    model(input_ids=ids[None], use_cache=False)


def decoding(bench: Bench, shape: str, tokens: list[int], seconds: float) -> dict[str, Any]:
    """Measure decoding under h2o beside plain generation of as many tokens, at each length that the time allows."""
    start, model = time.monotonic(), bench.loaded(shape).model
    (run,) = runs_of(plans(["h2o"]), parse_budgets("20%"), Loop.closed)
    found: list[dict[str, Any]] = []
    skipped: list[int] = []
    last = 0.0
    for count in sorted({min(DECODED, *tokens), *tokens}):
        ids, left = bench.ids(shape, count), seconds - (time.monotonic() - start)
        if found and last * (count / found[-1]["tokens"]) ** 1.2 > left:
            skipped.append(count)
            continue
        begun = time.monotonic()
        work = {"decoding": partial(real, model, ids, run), "generate": partial(generate, model, ids)}
        took, figures = bench.measure(work, left / 4)
        last = (time.monotonic() - begun) * 2 / (1 + figures["rounds"])
        per_token = {name: summary([one / count for one in values]) for name, values in took.items()}
        entry = {"tokens": count, "seconds_per_token": per_token}
        found.append(figures | entry | {"decoding_over_generate": ratio(took["decoding"], took["generate"])})
    return {"policy": "h2o at 20%", "by_tokens": found, "tokens_skipped": skipped}


def tracing(bench: Bench, shape: str, seconds: float) -> dict[str, Any]:
    """Measure tracing in both stores beside plain generation and eager attention with its weights kept in memory."""
    start, loaded, (prompt, new) = time.monotonic(), bench.loaded(shape), bench.traced

    def run(kind: str, count: int) -> None:
        with torch.inference_mode():
            action(kind, loaded)(prompt, count)

    few = min(new, 8)  # also the warm-up; the peak is that of the prompt, except where all weights are kept
    memory = {kind: memory_of(partial(run, kind, new if kind == "eager" else few), bench.device) for kind in KINDS}
    run("plain", new)  # cuDNN prepares attention for every number of keys when it first sees it
    left = seconds - (time.monotonic() - start)
    took = side_by_side(
        {kind: partial(run, kind, new) for kind in KINDS}, left, bench.rounds, partial(timed, device=bench.device)
    )
    ratios = {
        f"{kind}_over_{other}": ratio(took[kind], took[other])
        for other in ("plain", "eager")
        for kind in KINDS
        if kind not in ("plain", other)
    }
    return {
        "prompt": prompt,
        "new": new,
        "rounds": len(took["plain"]),
        "seconds": {kind: summary(values) for kind, values in took.items()},
        "ratios": ratios,
        "peak_mib_above_model": memory,
        "extra_mib_over_plain": {kind: round(memory[kind] - memory["plain"], 1) for kind in KINDS},
    }


def replaying(bench: Bench, shape: str, seconds: float) -> dict[str, Any]:
    """Measure a replay of 24 pairs with all metrics on the device and on the CPU, of some layers and of all."""
    start, loaded, (prompt, new) = time.monotonic(), bench.loaded(shape), bench.traced
    layers = loaded.model.config.num_hidden_layers
    few = min(bench.layers, layers)
    part = bench.folder / f"{shape}-part"
    recorded(loaded, prompt, new, part, most_layers=few)
    trace = open_trace(part)
    work: dict[str, Callable[[], object]] = {
        "device": lambda: bench.replay(trace, bench.device),
        "cpu": lambda: bench.replay(trace, "cpu"),
    }
    memory = memory_of(work["device"], bench.device)  # also the warm-up
    left = seconds - (time.monotonic() - start)
    took = side_by_side(work, left / 2, bench.rounds, partial(timed, device=bench.device))
    figures: dict[str, Any] = {
        "policies": REPLAYED,
        "budgets": EIGHT_BUDGETS,
        "layers": few,
        "rounds": len(took["cpu"]),
        "seconds": {name: summary(values) for name, values in took.items()},
        "cpu_over_device": ratio(took["cpu"], took["device"]),
        "peak_mib": memory,
    }
    shutil.rmtree(part)
    return figures | {"all_layers": _all_layers(bench, loaded, took["device"], seconds - (time.monotonic() - start))}


def _all_layers(bench: Bench, loaded: Loaded, took: list[float], left: float) -> dict[str, Any]:
    """Return the seconds of the same replay of a trace of all layers, or why it is skipped."""
    layers = loaded.model.config.num_hidden_layers
    expected = min(took) * layers / min(bench.layers, layers)
    if expected > left:
        return {"skipped": f"it takes some {expected:.0f} seconds and {left:.0f} were left"}
    path = bench.folder / "all"
    recorded(loaded, *bench.traced, path)
    trace = open_trace(path)
    took = [timed(lambda: bench.replay(trace, bench.device), bench.device)]
    shutil.rmtree(path)
    return {"layers": layers, "seconds": took[0]}


def stepping(bench: Bench, tokens: int, seconds: float) -> dict[str, Any]:
    """Measure a step of one layer of 32 query heads, and on a GPU also tova without bounds of its scores."""
    shape = Shape(layers=(0,), heads=32, kv_heads=32, prompt=1, length=tokens)
    generator = torch.Generator(bench.device).manual_seed(0)
    logits = torch.randn(1, 32, tokens, tokens, device=bench.device, generator=generator)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=bench.device).triu(1)
    rows = torch.softmax(logits.masked_fill_(later, -torch.inf), -1)

    def step(name: str) -> None:
        simulation = CacheSimulation(*parse_policies([name]), [tokens // 5], shape, Prefill.stream, device=bench.device)
        for start in range(0, tokens, GPU_BLOCK_QUERIES):
            stop = min(start + GPU_BLOCK_QUERIES, tokens)
            simulation.block(Block(rows[:, :, start:stop, :stop], start))

    def without_bounds() -> None:
        with mock.patch("kvscope.kernels.step_block_triton.FEWEST_HEADS", sys.maxsize):
            step("tova")

    work: dict[str, Callable[[], object]] = {"h2o": lambda: step("h2o"), "tova": lambda: step("tova")}
    if bench.device.startswith("cuda"):
        work["tova_without_bounds"] = without_bounds
    took, figures = bench.measure(work, seconds)
    microseconds = {name: summary([1e6 * one / tokens for one in values]) for name, values in took.items()}
    return figures | {"heads": 32, "budget": tokens // 5, "microseconds_per_step": microseconds}


def decisions(bench: Bench, seconds: float) -> dict[str, Any]:
    """Compare the decisions of every policy on the device with those on the CPU."""
    example, ties = _example(bench), {}
    start, seed = time.monotonic(), 0
    most = 1 if bench.device == "cpu" else 4  # the CPU decides as itself: one seed tries the check out
    while not seed or (seed < most and (time.monotonic() - start) * (seed + 1) / seed < seconds):
        ties |= {f"{name} {seed}": count for name, count in _ties(bench.device, seed).items()}
        seed += 1
    different = {name: count for name, count in (example | ties).items() if count}
    figures = {
        "example_runs": len(example),
        "runs_on_rows_with_ties": len(ties),
        "different": different,
        "equal": not different,
    }
    return figures | ({"error": f"{len(different)} runs decide otherwise than on the CPU"} if different else {})


def _example(bench: Bench) -> dict[str, int]:
    """Return for each run over the example trace how many layers differ, 0 or more."""
    trace = open_trace(EXAMPLE)
    found = []
    for device in dict.fromkeys(("cpu", bench.device)):
        options = ReplayOptions(device=device, metrics=("retained_mass",), skip_unsupported=True)
        job = compile_replay(trace, POLICIES.names(), "20%,40%", options)
        output = OutputOptions(bench.folder / "example", force=True)
        found.append({f"{run.label} {run.budget}": run.decisions for run in job.execute(output).info.runs})
    return {label: int(found[0][label] != found[-1][label]) for label in found[0]}


def _ties(device: str, seed: int) -> dict[str, int]:
    """Return for each policy how many keys are evicted at another step than on the CPU, on rows with many ties."""
    shape = Shape(layers=(0, 1), heads=8, kv_heads=2, prompt=48, length=160)  # so many decide by bounds in tova
    rows = rows_with_ties(shape, seed)
    observed = ROWS - {"schedule"}
    policies = [policy for policy in parse_policies(POLICIES.names()) if policy.traits.needs <= observed]
    found = {}
    for prefill in Prefill:
        for policy in policies:
            try:
                EvictionPlan.published(policy).require(prefill)
            except UsageError:
                continue  # not defined for this prefill
            leave = [evictions(policy, rows, shape, prefill, where) for where in ("cpu", device)]
            found[f"{policy.label} {prefill}"] = int((leave[0] != leave[1]).sum())
    return found


def evictions(policy: Any, rows: torch.Tensor, shape: Shape, prefill: Prefill, device: str) -> torch.Tensor:
    """Return the steps at which keys are evicted, ``[R, L, G, T]``, on the CPU."""
    simulation = CacheSimulation(policy, [24, 40], shape, prefill, device=device)
    for start in range(0, shape.length, STEPS):
        stop = min(start + STEPS, shape.length)
        simulation.block(Block(rows[:, :, start:stop, :stop].to(device), start))
    return simulation.state.leave.cpu()


def rows_with_ties(shape: Shape, seed: int) -> torch.Tensor:
    """Return causal rows ``[L, H, T, T]`` whose sums are exact in any order, so that ties are ties anywhere."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(shape.layers), shape.heads, shape.length, shape.length)
    for t in range(shape.length):
        keys = torch.randint(t + 1, (*rows.shape[:2], BALLS), generator=draw)
        rows[:, :, t].scatter_add_(-1, keys, torch.full(keys.shape, 1 / BALLS))
    return rows
