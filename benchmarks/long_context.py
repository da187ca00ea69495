"""Seconds and peak memory to trace, replay and report a long prompt on a small machine.

``python benchmarks/long_context.py [--tokens 32768] [--output benchmarks/results/long_context.json]``

A random model of the demo model's shape, with a context for so many tokens, reads books repeatedly and generates 64
tokens. The commands are ``kvscope trace --store qkv``, ``kvscope replay`` with three policies under a budget of 2,048
keys, and ``kvscope report``, each in its own process. Peak memory is the resident size of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from kvscope.core.options import ModelSource
from kvscope.model.loading import load

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
POLICIES = ("h2o", "a2sf", "tova")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_context.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompt = prepare(folder, args.tokens)
        chosen = [part for policy in POLICIES for part in ("--policy", policy)]
        steps = {
            "trace": ["trace", "--model", "model", prompt, "--store", "qkv", "--max-new-tokens", "64", "-o", "long"],
            "replay": ["replay", "long", *chosen, "--budget", str(args.budget), "-o", "run"],
            "report": ["report", "run", "-o", "page.html"],
        }
        figures: dict[str, Any] = {
            "machine": machine(),
            "tokens": args.tokens,
            "policies": POLICIES,
            "budget": args.budget,
        }
        for step, words in steps.items():
            figures[step] = measured(words, folder)
            print(step, figures[step], flush=True)
        figures["trace"]["mib"] = size(next(folder.rglob("trace.json")).parent)
        figures["report"]["mib"] = size(next(folder.rglob("*.html")))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def prepare(folder: Path, tokens: int) -> str:
    """Save a random model with room for so many tokens, and a prompt of about as many; return the prompt's name."""
    demo = load(ModelSource("demo"))
    config = type(demo.model.config)(**{**demo.model.config.to_dict(), "max_position_embeddings": tokens + 64})
    type(demo.model)(config).save_pretrained(folder / "model")
    demo.tokenizer.model_max_length = tokens + 64
    demo.tokenizer.save_pretrained(folder / "model")
    passages = json.loads(DATA.read_text())["passages"]
    text = " ".join(passages * (1 + tokens // 512))
    ids = demo.tokenizer(text)["input_ids"][:tokens]
    (folder / "long.txt").write_text(demo.tokenizer.decode(ids, skip_special_tokens=True))
    return "long.txt"


def measured(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command, and return its seconds and its peak resident size in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvscope", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{said}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}


def size(path: Path) -> float:
    """Return the size of a file, or of all files of a folder, in MiB."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 2**20, 1)


if __name__ == "__main__":
    main()
