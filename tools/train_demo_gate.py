"""Train the gate of the bundled model: ``python tools/train_demo_gate.py TEXTS -o gate.safetensors``.

The gate learns from the training data of the model, books and recall episodes, with the training loop of ``kvscope gate
train``, which reads plain text files only. The data that selects its best step is held out of this training data. So
neither the gate nor that selection uses the text that the model was not trained on; benchmarks and tests use that text.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from demo_data import BOOKS, Sample, Source, read_books

from kvscope.core.gate_options import TrainingSettings
from kvscope.gates.file import GateFacts
from kvscope.gates.module import LearnedGate
from kvscope.model.loading import load
from kvscope.model.sample import sample
from kvscope.training.fit import Evaluation
from kvscope.training.tasks import TextReading, Texts
from kvscope.training.train_gate import finish

LENGTHS = [256, 256, 256, 256, 512]
TOKENS = 2048  # of a step
EPISODES = 0.5  # share of sequences in which facts are asked for
JUDGED = 6  # batches of sequences for evaluation
LAST = 20  # each book has so many parts; the last one is for evaluation


def texts(source: Source, seed: list[int], length: int) -> Texts:
    """Return sequences; the same seed gives the same sequences."""
    source.random = random.Random(str(seed))
    source.numpy = np.random.default_rng(seed)
    samples: list[Sample] = [
        source.episode(length) if source.random.random() < EPISODES else source.book(length)
        for _ in range(TOKENS // length)
    ]
    ids, weights = (torch.tensor([getattr(one, name) for one in samples]) for name in ("ids", "weights"))
    return Texts(ids, weights, source.random.randint(length // 4, length * 3 // 4))


def apart(books: list[str]) -> tuple[list[str], list[str]]:
    """Return the part of each book for training, and the part that evaluates the gate."""
    cuts = [len(book) * (LAST - 1) // LAST for book in books]
    return (
        [book[:cut] for book, cut in zip(books, cuts, strict=True)],
        [book[cut:] for book, cut in zip(books, cuts, strict=True)],
    )


def main() -> None:
    """Parse the command line, train, and write the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder with the books, one .txt each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--target-keep", type=float, default=0.5)
    parser.add_argument("--eviction-loss", choices=["one-sided", "absolute", "square"], default="square")
    parser.add_argument("--strength", type=float, default=40.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--form", choices=["causal", "bidirectional"], default="causal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    loaded = load("demo")
    config = loaded.text_config
    parts = apart(read_books(args.texts)[0])
    trained, judging = (Source(loaded.tokenizer.backend_tokenizer, part, args.seed) for part in parts)
    task = TextReading(
        loaded.model.requires_grad_(False),
        lambda step: texts(trained, [args.seed, step], LENGTHS[step % len(LENGTHS)]),
        [texts(judging, [args.seed, 10**6 + number], 256) for number in range(JUDGED)],
    )
    torch.manual_seed(args.seed)
    facts = GateFacts(
        model="demo",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv_heads=config.num_key_value_heads,
        form=args.form,
    )
    settings = TrainingSettings(
        target_keep=args.target_keep,
        eviction=args.eviction_loss,
        strength=args.strength,
        steps=args.steps,
        rate=args.rate,
    )

    def told(step: int, evaluation: Evaluation) -> None:
        if step == evaluation.step:
            print(evaluation, flush=True)

    gate = LearnedGate(facts, torch.tensor(sample(loaded.model)))
    about = {
        "task": "reading",
        "texts": f"recall episodes and the first nine tenths of {', '.join(BOOKS)}, whose last twentieth judges",
        "seed": args.seed,
    }
    made = finish(gate, task, settings, args.output, about, args.resume, told)
    print("written:", made.best)


if __name__ == "__main__":
    main()
