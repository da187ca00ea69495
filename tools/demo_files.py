"""Write the files beside the bundled model: ``python tools/demo_files.py TEXTS MODEL --tests tests/data``.

They are a held-out set for the tests (``demo_heldout.json``), the demo prompt (``MODEL/prompt.txt``) and the model card
(``MODEL/README.md``). Input is the trained model, its ``training_log.json``, and the last tenths of the books.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from demo_data import Source, ask, plant, read_books
from tokenizers import Tokenizer
from train_demo_model import recall
from transformers import LlamaForCausalLM

DISTANCES = [64, 128, 256, 512]
PROMPT_TOKENS = (600, 760)
BROKEN = "\ufffd"  # where a passage begins or ends within a character

CARD = """# The bundled model

A Llama of {parameters:,} parameters for `kvscope demo`. It is small enough to come with the package, and
real enough to show what eviction does: asked for a fact stated hundreds of tokens earlier, it answers
when the whole cache is there, and not when a sliding window has evicted the fact. It writes no useful
text.

## Architecture

`LlamaForCausalLM`: {layers} layers, hidden size {hidden}, {heads} query heads of size {head_dim} over
{groups} key/value heads, rotary positions (base {theta:g}), context of {context} tokens, tied
embeddings, weights in {dtype} ({megabytes:.2f} MB). The tokenizer is a byte-level BPE of {vocabulary:,}
tokens in which every digit is a token.

## Data

The first nine tenths of five public-domain books (authors dead for over 70 years):

| work | author | first published |
|---|---|---|
| Alice's Adventures in Wonderland | Lewis Carroll | 1865 |
| Moby-Dick; or, The Whale | Herman Melville | 1851 |
| Pride and Prejudice | Jane Austen | 1813 |
| The Adventures of Sherlock Holmes | Arthur Conan Doyle | 1892 |
| War and Peace (English translation) | Leo Tolstoy | 1869 |

and generated sequences: book text in which facts (`{fact}`) are stated and asked for later
(`{question}`), book text with a passage that comes back, and repeated random tokens. The last tenth of
each book was never trained on; every score below is from there. The names are those of the training; the
values are drawn anew.

## Training

`tools/train_demo_model.py` with seed {seed}, on two CPU cores: {steps:,} steps in {minutes} minutes. Its
first two layers start with a rough ability to copy (weights set by hand, `head_start` in the script, trained
like all others): from random weights alone, copying did not appear in ten minutes. Training starts with
repeated random tokens, then mixes all kinds, at several lengths up to {context} tokens.
The tokens of asked-for values count more in the loss, so it is no perplexity.

| step | minutes | loss | held-out perplexity | recall at {distances} |
|---|---|---|---|---|
{log}

## Scores

Perplexity per token on held-out book text: **{perplexity}**.

Recall, an answer counting only if all its tokens are right under greedy decoding, {questions} questions
per distance:

| tokens between fact and question | full cache | sliding window of 20 % |
|---|---|---|
{scores}

The window lets each query see the newest 20 % of the positions. A prompt is little longer than its
distance, so the fact always lies outside the window of the question.

## Licence

The weights are under the licence of this package, Apache-2.0.
"""


def whole(source: Source, length: int) -> str:
    """Return about `length` tokens of book text, from the start of a line, with no character cut in two."""
    text: str = source.tokenizer.decode(source.text(length + 40)).strip(BROKEN)
    text = text[text.index("\n") + 1 :]
    return str(source.tokenizer.decode(source.encode(text)[:length])).strip(BROKEN)


def held_out_set(source: Source, passages: int = 8, questions: int = 20) -> dict[str, Any]:
    """Return passages of about 400 tokens, and questions at every distance with their values."""
    asked = []
    for distance in DISTANCES:
        drawn = 0
        while drawn < questions:
            prompt, value = source.exam(distance)
            text, answer = source.tokenizer.decode(prompt), source.tokenizer.decode(value)
            if BROKEN not in text:
                asked.append({"distance": distance, "prompt": text, "value": answer})
                drawn += 1
    return {"passages": [whole(source, 400) for _ in range(passages)], "recall": asked}


def draw_prompt(source: Source) -> tuple[str, list[tuple[str, str]]]:
    """Return book text with four facts, then their questions, the last unanswered; and all questions with values."""
    facts = source.facts(4)
    text = whole(source, 40)
    for fact in facts:
        text += plant(*fact) + whole(source, 25)
    text += "\n" + whole(source, 360)
    questions = []
    for name, verb, value in reversed(facts):
        text += ask(name, verb)
        questions.append((text, f" {value}"))
        text += f" {value}.\n"
    return questions[-1][0], questions


def demo_prompt(model: LlamaForCausalLM, source: Source, tries: int = 50) -> str:
    """Return the first drawn prompt of the right length of which the model answers every question."""
    for _ in range(tries):
        text, questions = draw_prompt(source)
        exams = [(source.encode(asked), source.encode(value)) for asked, value in questions]
        if PROMPT_TOKENS[0] <= len(exams[-1][0]) <= PROMPT_TOKENS[1] and recall(model, exams) == 1:
            return text
    raise SystemExit(f"the model answers none of {tries} prompts: train it longer")


def table(rows: list[list[Any]]) -> str:
    """Return the rows of a Markdown table."""
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def card(folder: Path, config: Any, questions: int = 100) -> str:
    """Return the model card, with the numbers of the training log."""
    record = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    log, final = record["log"], record["final"]
    judged = [entry for entry in log if "recall_full" in entry]
    every = max(1, len(judged) // 12)
    shown = sorted([*judged[::every], *judged[-1:]], key=lambda entry: entry["step"])
    shown = [entry for at, entry in enumerate(shown) if at == 0 or entry is not shown[at - 1]]
    rows = [
        [
            e["step"],
            e["minutes"],
            e["loss"],
            e["book_perplexity"],
            ", ".join(f"{r:.2f}" for r in e["recall_full"].values()),
        ]
        for e in shown
    ]
    scores = [
        [distance, f"{share:.2f}", f"{final['recall_window_20'][distance]:.2f}"]
        for distance, share in final["recall_full"].items()
    ]
    return CARD.format(
        parameters=record["parameters"], seed=record["seed"], steps=record["steps"], minutes=record["minutes"],
        layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        groups=config.num_key_value_heads, head_dim=config.head_dim, theta=config.rope_parameters["rope_theta"],
        context=config.max_position_embeddings, vocabulary=config.vocab_size,
        dtype=str(config.dtype).removeprefix("torch."),
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6, fact=plant("Dorian", "has", "482").strip(),
        question=ask("Dorian", "has").strip(), distances=", ".join(final["recall_full"]), log=table(rows),
        perplexity=final["book_perplexity"], questions=questions, scores=table(scores),
    )  # fmt: skip


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder with the books, one .txt each")
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("--tests", type=Path, required=True, help="folder for demo_heldout.json")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    source = Source(tokenizer, read_books(args.texts)[1], args.seed)
    held_out = json.dumps(held_out_set(source), indent=1, ensure_ascii=False) + "\n"
    (args.tests / "demo_heldout.json").write_text(held_out, encoding="utf-8")
    config = LlamaForCausalLM.config_class.from_pretrained(args.model)
    (args.model / "README.md").write_text(card(args.model, config), encoding="utf-8")
    (args.model / "prompt.txt").write_text(demo_prompt(model, source), encoding="utf-8")


if __name__ == "__main__":
    main()
