"""The closed loop compared with decoding token by token: seconds, their ratio, the cost of more runs, and memory.

``python benchmarks/closed_loop.py [--tokens 1024] [--runs 5] [--output benchmarks/results/closed_loop.json]``
``python benchmarks/closed_loop.py --only decoding,generate --tokens 128 --runs 9 --output
benchmarks/results/decoding.json``

The default is the bundled model on a CPU. With ``--device cuda --shape llama2-7b``, a model of that shape with random
weights is created on the device in half precision and reads random tokens. Prefill is streaming: every token is decoded
under the policy. Decoding feeds one token at a time through transformers' own forward pass, with a cache from which
keys are evicted after every step; the same policy decides in the same step. ``generate`` is transformers' own loop with
the full cache. All are timed in turn in one process. Figures are medians, and ratios are computed round by round.
Memory is the peak of the resident size (CPU) or of torch's allocations (GPU), minus the memory of the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from shapes import SHAPES, random_model

from kvscope.closed_loop.compile import evaluate
from kvscope.closed_loop.decode import decode
from kvscope.closed_loop.passage import Passage
from kvscope.core.budget import parse_budgets
from kvscope.core.options import ModelSource, Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.metrics import Metric
from kvscope.model.loading import load
from kvscope.policies.spec import parse_policies
from kvscope.trace.reader import TokenSequence

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
EIGHT = ["h2o", "tova", "a2sf", "streaming-llm"]  # at two budgets
RATIOS = {
    "decoding_over_closed": ("decoding", "closed"),
    "generate_over_closed": ("generate", "closed"),
    "decoding_over_generate": ("decoding", "generate"),
    "8_mixed_over_1": ("closed_8_mixed", "closed"),
    "8_budgets_over_1": ("closed_8_budgets", "closed"),
}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=[*SHAPES, "demo"], default="demo")
    parser.add_argument("--decoded", type=int, help="tokens really decoded; the rest is extrapolated, and said")
    parser.add_argument("--only", type=lambda text: text.split(","), help="some kinds of work, with commas")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/closed_loop.json"))
    args = parser.parse_args()
    model = (
        load(ModelSource("demo", device=args.device)).model
        if args.shape == "demo"
        else random_model(args.shape, args.device)
    )
    ids = torch.randint(3, model.config.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(0))
    figures = measured(model, ids.to(args.device), args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measured(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures."""
    budgets = "20%"
    one = runs_of(plans([args.policy]), parse_budgets(budgets), loop="closed")
    eight = runs_of(plans(EIGHT), parse_budgets("20%,40%"), loop="closed")
    budgeted = runs_of(plans([args.policy]), parse_budgets("5%,10%,15%,20%,25%,30%,40%,50%"), loop="closed")
    part = ids[: args.decoded or args.tokens]
    work: dict[str, Callable[[], object]] = {
        "closed": lambda: closed(model, ids, one),
        "closed_8_mixed": lambda: closed(model, ids, eight),
        "closed_8_budgets": lambda: closed(model, ids, budgeted),
        "decoding": lambda: real(model, part, one[0]),
        "generate": lambda: generate(model, part),
    }
    work = {name: run for name, run in work.items() if args.only is None or name in args.only}
    memory = {name: memory_of(run, args.device) for name, run in work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.runs):
        for name, run in work.items():
            seconds[name].append(timed(run, args.device))
    scale = len(ids) / len(part)
    scales = {"decoding_over_closed": scale, "generate_over_closed": scale}  # others compare equal numbers of tokens
    ratios = {
        name: [scales.get(name, 1) * a / b for a, b in zip(seconds[one_kind], seconds[other], strict=True)]
        for name, (one_kind, other) in RATIOS.items()
        if {one_kind, other} <= set(work)
    }
    if args.shape == "demo" and args.only is None:
        ratios["8_mixed_over_1_as_commands"] = commands(args.runs)
    return {
        "machine": machine(args.device),
        "model": args.shape,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": len(ids),
        "really_decoded": len(part),
        "policy": args.policy,
        "eight": [f"{name} at 20% and 40%" for name in EIGHT],
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratios": {name: summary(values) for name, values in ratios.items()},
        "memory_mib": memory,
    }


def commands(runs: int) -> list[float]:
    """Return seconds of ``kvscope perplexity`` with eight runs and with one, including the start of the program."""
    passages = json.loads(DATA.read_text())["passages"]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text(" ".join(passages[:2]))
        for _ in range(runs):
            one, eight = (
                timed(partial(command, folder, names, budgets), "cpu")
                for names, budgets in (([EIGHT[0]], "20%"), (EIGHT, "20%,40%"))
            )
            ratios.append(eight / one)
    return ratios


def command(folder: str, names: list[str], budgets: str) -> None:
    """Run ``kvscope perplexity`` on a text."""
    chosen = [part for name in names for part in ("--policy", name)]
    words = ["perplexity", "--model", "demo", "text.txt", *chosen, "--budget", budgets, "-q", "--force", "-o", "run"]
    subprocess.run([sys.executable, "-m", "kvscope", *words], cwd=folder, check=True, capture_output=True)


class Nothing:
    """A result sink that discards everything."""

    def residency(self, *_: Any, **__: Any) -> None:
        """Discard residency intervals."""

    def fidelity(self, *_: Any, **__: Any) -> None:
        """Discard metrics."""

    def tokens(self, *_: Any, **__: Any) -> None:
        """Discard losses."""


def plans(names: list[str]) -> list[EvictionPlan]:
    """Return the published plans of some policies."""
    return [EvictionPlan.published(policy) for policy in parse_policies(names)]


def closed(model: Any, ids: torch.Tensor, runs: list[RunSpec], metrics: Sequence[Metric] = ()) -> None:
    """Compute the losses of a text under some runs, and metrics of each."""
    evaluate(model, [Passage(TokenSequence(0, 1, len(ids)), ids)], runs, metrics, Prefill.stream, Nothing())


def real(model: Any, ids: torch.Tensor, run: RunSpec) -> None:
    """Decode a text under one run, token by token."""
    keys = run.keys(TokenSequence(0, 1, len(ids)), Prefill.stream)
    decode(model, ids, run.plan, keys, prompt=1, prefill=Prefill.stream)


def generate(model: Any, ids: torch.Tensor) -> None:
    """Generate as many tokens with the full cache."""
    with torch.inference_mode():
        count = len(ids) - 1
        model.generate(ids[None, :1], max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)


def timed(run: Callable[[], object], device: str) -> float:
    """Return seconds."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def memory_of(run: Callable[[], object], device: str) -> float:
    """Return the rise of peak memory in MiB: of torch's allocations on a GPU, of the process on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, 1)


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median and the range."""
    return {"median": round(statistics.median(values), 4), "range": [round(min(values), 4), round(max(values), 4)]}


if __name__ == "__main__":
    main()
