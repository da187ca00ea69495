"""All that kvscope costs on one GPU, in eight minutes and one file, from random weights and without a network.

``python benchmarks/gpu.py [--device cuda] [--minutes 8] [--out benchmarks/results/gpu.json]``

For models of the shapes of Llama-2-7B and Llama-3-8B, at 512, 2,048 and 8,192 tokens: the closed loop of h2o at 20 %
and of eight runs, with and without metrics, in multiples of forward passes and of plain generation; decoding under the
policy beside plain generation; tracing in both stores beside plain and eager generation; a replay of 24 policies and
budgets on the GPU and on the CPU; peak memory of each. A check that GPU and CPU decide the same comes first, then
a step of h2o and of tova in a layer of 32 heads.

Seconds are medians, and ratios are computed round by round. The file is replaced after every section, so a run that is
cut off keeps its figures. A section that the time no longer allows is named under ``skipped``, one that fails under
``failed``; then the exit status is 1. To try it out: ``--device cpu --shape tiny --tokens 64,128 --traced 32,8``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from gpu_sections import Bench, closed_loop, decisions, decoding, replaying, stepping, tracing
from machine import machine
from sections import Measurement, Section
from shapes import SHAPES

from kvscope.core.version import versions

HOW = "Seconds, tokens and MiB; medians. Memory is the peak above the model: of torch's allocations, or of the process."


def main() -> int:
    """Measure, write the figures, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=names, default=["llama2-7b", "llama3-8b"], help="one or more, with commas")
    parser.add_argument("--tokens", type=numbers, default=[512, 2048, 8192], help="lengths of the texts")
    parser.add_argument("--traced", type=numbers, default=[1024, 256], help="prompt and new tokens of a tracing")
    parser.add_argument("--layers", type=int, default=4, help="layers of the trace that the CPU replays too")
    parser.add_argument("--rounds", type=int, default=5, help="most rounds of a measurement")
    parser.add_argument("--only", type=lambda text: text.split(","), help="some kinds of sections, with commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit on all of it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    about = {
        "how": HOW,
        "machine": machine(args.device),
        "versions": versions("torch", "transformers"),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
    }
    measurement = Measurement(args.out, about, 60 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.device, Path(folder), args.rounds, tuple(args.traced), args.layers)
        chosen = sections(bench, args.shape, args.tokens)
        measurement.run([section for section in chosen if args.only is None or section.name in args.only])
    return 1 if measurement.failed else 0


def sections(bench: Bench, shapes: list[str], tokens: list[int]) -> list[Section]:
    """Return the sections, those of one shape together, and of those the short ones first."""
    found = [Section("decisions", "all", None, 60, partial(decisions, bench))]
    found += [
        Section("stepping", "all", count, 10, partial(stepping, bench, count)) for count in tokens if count <= 2048
    ]
    for shape in shapes:

        def closed_loops(count: int, shape: str = shape) -> list[Section]:
            return [
                Section(name, shape, count, seconds, partial(closed_loop, bench, shape, count, eight))
                for name, seconds, eight in (("closed loop", 20, False), ("closed loop of eight", 40, True))
            ]

        short, *longer = sorted(tokens)
        found += closed_loops(short)
        found.append(Section("decoding", shape, None, 30, partial(decoding, bench, shape, tokens)))
        found.append(Section("tracing", shape, None, 60, partial(tracing, bench, shape)))
        found.append(Section("replaying", shape, None, 40, partial(replaying, bench, shape)))
        found += [section for count in longer for section in closed_loops(count)]
    return found


def names(text: str) -> list[str]:
    """Return the shapes that a text names."""
    unknown = sorted(set(text.split(",")) - set(SHAPES))
    if unknown:
        raise argparse.ArgumentTypeError(f"no shape {unknown[0]}: {', '.join(SHAPES)}")
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Return the numbers in a text."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
