"""The cost of tracing: time compared with plain generation and with eager attention, and memory as the prompt grows.

``python benchmarks/trace_cost.py [--output benchmarks/results/trace_cost.json]``

Time is measured for plain greedy decoding with the model's own kernel (sdpa), for the same while attention is recorded
to disk in either store, and for decoding as one gets attention from transformers itself
(``attn_implementation="eager"`` with ``output_attentions=True``, kept in memory). All are timed in turn in one process,
as wall time and processor time; figures are medians, and ratios are computed round by round. Memory is the rise of the
resident size of a fresh process above its size before the prompt, for a random model of the demo model's shape with a
longer context. All rows of one layer at 4,096 tokens take 512 MiB in float32, and a quarter of that at 2,048. One
thread unless set otherwise: on a busy machine, several threads wait for each other.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from shapes import SHAPES, random_loaded

from kvscope.core.options import ModelSource
from kvscope.model.attention_hook import observe_attention
from kvscope.model.loading import Loaded, load
from kvscope.model.pipeline import Pipeline, threads_for
from kvscope.model.recorder import Recorder
from kvscope.model.selfcheck import self_check
from kvscope.trace.record import ModelRecord, SequenceRecord, TraceHeader
from kvscope.trace.schema import STORES as SIGNALS
from kvscope.trace.writer import TraceWriter

PROMPTS = (512, 1024, 2048, 4096)
STORES = ("maps", "qkv")
KINDS = ("plain", "eager", *STORES)
HOW = (
    "Seconds and MiB; medians. The kinds are timed in turn, and each ratio is of one round: the one to quote is "
    "the median of the ratios. Where other work runs on the machine, trust processor time (cpu) more than the clock."
)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this shape in place of --model")
    parser.add_argument("--device", default="cpu", help="with --shape; memory is then what torch allocated")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trace_cost.json"))
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.model, args.prompt, args.peak))
        return
    figures: dict[str, Any] = {"how": HOW, "machine": machine(args.device if args.shape else "cpu")}
    if args.shape:
        loaded = random_loaded(args.shape, args.device)
        figures |= {"model": loaded.name, "device": args.device, "time": times(loaded, args)}
        if args.device != "cpu":
            figures |= {"memory": gpu_memory(loaded, args)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            long_context(Path(folder))
            figures |= {"model": "random, the demo model's shape"}
            figures |= {"time": times(load(ModelSource(str(folder))), args), "memory": memory(folder)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def action(kind: str, loaded: Loaded) -> Callable[[int, int], None]:
    """Return a function that decodes with the kernel of this kind: ``action(kind, loaded)(prompt, new)``."""
    loaded.model.set_attn_implementation("eager" if kind == "eager" else "sdpa")
    if kind in ("plain", "eager"):
        return partial(decode, loaded, attentions=kind == "eager")
    return partial(record, loaded, store=kind)


def times(loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    """Return wall and processor seconds of decoding of each kind, measured in turn, and their ratios to plain."""
    laps: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for _ in range(args.runs + 1):  # the first round is a warm-up
            for kind in KINDS:
                laps[kind].append(timed(partial(action(kind, loaded), args.prompt, args.new)))
    figures: dict[str, Any] = {"prompt": args.prompt, "new": args.new, "runs": args.runs}
    for number, clock in enumerate(("wall", "cpu")):
        seconds = {kind: [lap[number] for lap in laps[kind][1:]] for kind in KINDS}
        figures[clock] = {"seconds": {kind: round(statistics.median(own), 4) for kind, own in seconds.items()}}
        for kind in KINDS[1:]:
            ratios = [late / early for early, late in zip(seconds["plain"], seconds[kind], strict=True)]
            figures[clock][f"{kind}_over_plain"] = {
                "median": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    return figures


def memory(model: str) -> list[dict[str, float]]:
    """Return the rise in MiB of fresh processes of each kind for each prompt length; medians of three."""
    rows = []
    for prompt in PROMPTS:
        row: dict[str, float] = {"prompt": prompt}
        for kind in KINDS:
            command = [sys.executable, __file__, "--model", model, "--prompt", str(prompt), "--peak", kind]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(3)]
            row[kind] = statistics.median(float(run.stdout) for run in runs)
        added = row["eager"] - row["plain"]
        row |= {f"{kind}_of_eager": round((row[kind] - row["plain"]) / added, 3) for kind in STORES}
        rows.append(row)
    return rows


def gpu_memory(loaded: Loaded, args: argparse.Namespace) -> dict[str, float]:
    """Return the peak of torch's allocations minus the model, in MiB, for each kind."""
    found = {}
    for kind in KINDS:
        run = action(kind, loaded)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            run(args.prompt, args.new)
        found[kind] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found


def long_context(folder: Path) -> None:
    """Save a random model of the demo model's shape with room for the longest prompt, and its tokenizer."""
    demo = load(ModelSource("demo"))
    config = type(demo.model.config)(**{**demo.model.config.to_dict(), "max_position_embeddings": max(PROMPTS) + 64})
    type(demo.model)(config).save_pretrained(folder)
    demo.tokenizer.save_pretrained(folder)


def peak(model: str, prompt: int, kind: str) -> float:
    """Return by how many MiB the resident size rises in a prefill and a few steps."""
    run = action(kind, load(ModelSource(model)))
    with torch.inference_mode():
        run(64, 2)  # allocate what is allocated only once
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak (Linux)
        before = resident("VmRSS")
        run(prompt, 8)
    return round(resident("VmHWM") - before, 1)


def resident(which: str) -> float:
    """Return the resident size of this process, now (VmRSS) or at its peak (VmHWM), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(which))) / 1024


def decode(loaded: Loaded, prompt: int, new: int, *, attentions: bool = False) -> None:
    """Generate greedily, as transformers does; with `attentions` it returns all rows."""
    loaded.model.generate(
        prompt_ids(loaded, prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=attentions,
        output_attentions=attentions,
    )


def prompt_ids(loaded: Loaded, prompt: int) -> torch.Tensor:
    """Return random tokens ``[1, P]``, the same every time."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(1, loaded.model.config.vocab_size, (1, prompt), generator=draw).to(loaded.device)


def record(loaded: Loaded, prompt: int, new: int, *, store: str) -> None:
    """Decode the same while attention is written to disk."""
    with tempfile.TemporaryDirectory() as folder:
        recorded(loaded, prompt, new, Path(folder) / "trace", store=store)


def recorded(
    loaded: Loaded, prompt: int, new: int, path: Path, *, store: str = "maps", most_layers: int | None = None
) -> None:
    """Decode while the attention of the first layers, by default of all, is written to a trace."""
    facts = self_check(loaded.model, torch.ones(1, 8, dtype=torch.long, device=loaded.device))
    layers = list(facts.windows)[:most_layers]
    header = TraceHeader(
        source="model",
        protocol="generated",
        model=ModelRecord(id=loaded.name),
        layers=layers,
        n_layers=len(facts.windows),
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        stored=sorted(SIGNALS[store]),
        attention=[facts.attention[layer] for layer in layers] if store == "qkv" else [],
        layer_types=["full"] * len(layers),
        sliding_window=[None] * len(layers),
        vector_dtype=facts.vector_dtype,
    )
    with torch.inference_mode(), TraceWriter(path, header) as writer:
        with Pipeline(threads_for(loaded.device)) as pipeline:
            recorder = Recorder(writer, layers, store=store, vector_dtype=facts.vector_dtype, pipeline=pipeline)
            recorder.begin(0, prompt)
            with observe_attention(loaded.model, recorder, inputs=recorder.reads_inputs):
                decode(loaded, prompt, new)
            recorder.end()
        length = prompt + new - 1  # the last token is chosen, but not run through the model
        unknown = [float("nan")] * length
        writer.tokens(
            0,
            token_id=[0] * length,
            text=["x"] * length,
            is_prompt=[position < prompt for position in range(length)],
            logprob=unknown,
            entropy=unknown,
        )
        writer.finish([SequenceRecord(prompt, length)])


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds and the processor seconds of an action."""
    start, busy = time.perf_counter(), time.process_time()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()
