"""Train the scorers of the bundled model: ``python tools/train_demo_scorers.py TEXTS -o scorers.safetensors``.

They learn from prompts of the model's training data, books and recall episodes, with ``kvscope gate scorers``. Their
width is small, as the model is.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from demo_data import Source, read_books

from kvscope.core.gate_options import ScorerSettings
from kvscope.core.options import ModelSource
from kvscope.model.generate import trace
from kvscope.model.loading import load
from kvscope.trace.reader import open_trace
from kvscope.training.scorers import train_scorers

LENGTHS = (160, 320, 480)  # tokens of prompts; the model reads each twice within its context
EVERY = 64  # rows of attention are not needed, and few are stored


def main() -> None:
    """Parse the command line, record prompts, train, and write the scorers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder with the books, one .txt each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = Source(load(ModelSource("demo")).tokenizer.backend_tokenizer, read_books(args.texts)[0], args.seed)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(args.prompts):
            length = LENGTHS[number % len(LENGTHS)]
            drawn = source.episode(length) if number % 2 else source.book(length)
            files.append(Path(folder) / f"{number:03d}.txt")
            files[-1].write_text(source.tokenizer.decode(drawn.ids).strip("\ufffd"), encoding="utf-8")
        trace("demo", files, output=Path(folder) / "t", max_new_tokens=1, hidden=True, reread=True, query_stride=EVERY)
        made = train_scorers(
            [open_trace(Path(folder) / "t")], args.output, ScorerSettings(width=args.width, seed=args.seed)
        )
    print("written:", made.explained, made.rank)


if __name__ == "__main__":
    main()
