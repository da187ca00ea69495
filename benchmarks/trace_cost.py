"""What tracing costs: time beside plain generate, and memory as the prompt grows.

``python benchmarks/trace_cost.py [--model demo] [--output benchmarks/results/trace_cost.json]``

Time: plain greedy decoding with the model's own kernel, and the same while every row is recorded to disk, in turn
in one process; medians and the ratio pair by pair. Memory: peak resident size of a fresh process for each prompt
length, with and without recording; a term that grows with the square of the prompt would show in the differences.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kvscope.model.attention_hook import watching
from kvscope.model.loading import Loaded, load
from kvscope.model.recorder import Recorder
from kvscope.model.selfcheck import self_check
from kvscope.trace.schema import TraceHeader
from kvscope.trace.writer import TraceWriter

PROMPTS = (128, 256, 512, 896)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trace_cost.json"))
    parser.add_argument("--peak", choices=["plain", "traced"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.model, args.prompt, args.peak == "traced"))
        return
    figures = {"machine": machine(), "time": times(args), "memory": memory(args.model)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of plain and of traced decoding, in turn, and their ratios."""
    loaded = load(args.model)
    plain, traced = [], []
    with torch.inference_mode():
        for _ in range(args.runs + 1):  # the first pair is a warm-up
            plain.append(timed(lambda: decode(loaded, args.prompt, args.new)))
            traced.append(timed(lambda: record(loaded, args.prompt, args.new)))
    ratios = [after / before for before, after in zip(plain[1:], traced[1:], strict=True)]
    return {
        "prompt": args.prompt,
        "new": args.new,
        "runs": args.runs,
        "plain_seconds_median": round(statistics.median(plain[1:]), 4),
        "traced_seconds_median": round(statistics.median(traced[1:]), 4),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def memory(model: str) -> list[dict[str, float]]:
    """Return peak MiB of fresh processes, plain and traced, for each prompt length."""
    rows = []
    for prompt in PROMPTS:
        both = {}
        for kind in ("plain", "traced"):
            command = [sys.executable, __file__, "--model", model, "--prompt", str(prompt), "--peak", kind]
            both[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"prompt": prompt, **both, "extra": round(both["traced"] - both["plain"], 1)})
    return rows


def peak(model: str, prompt: int, traced: bool) -> float:
    """Return the peak resident size in MiB after a prefill and a few steps."""
    loaded = load(model)
    with torch.inference_mode():
        (record if traced else decode)(loaded, prompt, 8)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


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


def timed(action: Any) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
