"""What tracing costs: time beside plain generate, and memory as the prompt grows.

``python benchmarks/trace_cost.py [--model demo] [--output benchmarks/results/trace_cost.json]``

Time: plain greedy decoding with the model's own kernel, and the same while every row is recorded to disk, in turn
in one process; medians and the ratio pair by pair, by the clock and in processor time. Memory: how far the resident
size of a fresh process rises above what it was before the prompt, with and without recording, for a random model of
the demo model's shape with a longer context. All rows of one layer at 4,096 tokens would be 512 MiB in float32, and
four times less at 2,048. One thread, unless told: several wait for each other where other work runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from kvscope.model.attention_hook import watching
from kvscope.model.loading import Loaded, load
from kvscope.model.recorder import Recorder
from kvscope.model.selfcheck import self_check
from kvscope.trace.schema import TraceHeader
from kvscope.trace.writer import TraceWriter

PROMPTS = (512, 1024, 2048, 4096)
HOW = (
    "Seconds and MiB; medians. Plain and traced decoding alternate, and each ratio is of one pair: the one to quote is "
    "the median of the ratios. Where other work runs on the machine, trust processor time (cpu) more than the clock."
)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trace_cost.json"))
    parser.add_argument("--peak", choices=["plain", "traced"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.model, args.prompt, args.peak == "traced"))
        return
    figures = {"how": HOW, "machine": machine(), "time": times(args), "memory": memory()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of plain and of traced decoding, in turn, by the clock and of processor time, and their ratios."""
    loaded = load(args.model)
    plain, traced = [], []
    with torch.inference_mode():
        for _ in range(args.runs + 1):  # the first pair is a warm-up
            plain.append(timed(lambda: decode(loaded, args.prompt, args.new)))
            traced.append(timed(lambda: record(loaded, args.prompt, args.new)))
    figures = {"prompt": args.prompt, "new": args.new, "runs": args.runs}
    for number, clock in enumerate(("wall", "cpu")):
        before, after = ([pair[number] for pair in runs[1:]] for runs in (plain, traced))
        ratios = [late / early for early, late in zip(before, after, strict=True)]
        figures[clock] = {
            "plain_seconds_median": round(statistics.median(before), 4),
            "traced_seconds_median": round(statistics.median(after), 4),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }
    return figures


def memory() -> list[dict[str, float]]:
    """Return the rise in MiB of fresh processes, plain and traced, for each prompt length; medians of three."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        long_context(Path(folder))
        for prompt in PROMPTS:
            both = {}
            for kind in ("plain", "traced"):
                command = [sys.executable, __file__, "--model", folder, "--prompt", str(prompt), "--peak", kind]
                runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
                both[kind] = statistics.median(float(run.stdout) for run in runs)
            rows.append({"prompt": prompt, **both, "extra": round(both["traced"] - both["plain"], 1)})
    return rows


def long_context(folder: Path) -> None:
    """Save a random model of the demo model's shape with room for the longest prompt, and its tokenizer."""
    demo = load("demo")
    config = type(demo.model.config)(**{**demo.model.config.to_dict(), "max_position_embeddings": max(PROMPTS) + 64})
    type(demo.model)(config).save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)


def peak(model: str, prompt: int, traced: bool) -> float:
    """Return by how many MiB the resident size rises in a prefill and a few steps."""
    loaded = load(model)
    action = record if traced else decode
    with torch.inference_mode():
        action(loaded, 64, 2)  # whatever is allocated once
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        before = resident("VmRSS")
        action(loaded, prompt, 8)
    return round(resident("VmHWM") - before, 1)


def resident(which: str) -> float:
    """Return the resident size of this process, now (VmRSS) or at its peak (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(which))) / 1024


def decode(loaded: Loaded, prompt: int, new: int) -> None:
    """Generate greedily, as transformers does."""
    loaded.model.generate(
        prompt_ids(loaded, prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


def prompt_ids(loaded: Loaded, prompt: int) -> torch.Tensor:
    """Return random tokens ``[1, P]``, the same every time."""
    return torch.randint(1, loaded.model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))


def record(loaded: Loaded, prompt: int, new: int) -> None:
    """Decode the same while every row is written to disk."""
    facts = self_check(loaded.model, torch.ones(1, 8, dtype=torch.long))
    layers = list(facts.windows)
    header = TraceHeader(
        source="model",
        protocol="generated",
        model={"id": loaded.name},
        layers=layers,
        n_layers=len(layers),
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        layer_types=["full"] * len(layers),
        sliding_window=[None] * len(layers),
    )
    with tempfile.TemporaryDirectory() as folder, TraceWriter(Path(folder) / "trace", header) as writer:
        recorder = Recorder(writer, layers)
        recorder.begin(0)
        with watching(loaded.model, recorder):
            decode(loaded, prompt, new)
        recorder.end()
        writer.finish([{"prompt": prompt, "length": prompt + new + 1, "forced": False}])


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that an action takes by the clock, and of processor time."""
    start, busy = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()
