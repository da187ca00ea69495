"""Training and evaluation data of the bundled model: books, recall episodes, repeated passages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOOKS = ["alice", "moby_dick", "pride_and_prejudice", "sherlock_holmes", "war_and_peace"]
NAMES = (
    "Ada Alice Anna Arthur Basil Boris Caleb Carlo Clara Conrad Dora Dorian Edgar Edith Elena Emma Felix "
    "Flora Frank Fred George Grace Hanna Harold Helen Henry Hugo Ida Igor Irene Ivan Jack Jane John Julia "
    "Karl Kate Laura Leo Lily Louis Lucy Lydia Marcus Maria Martin Mary Max Mina Nadia Nathan Nora Olga "
    "Oscar Paul Peter Philip Quentin Rachel Robert Rosa Ruth Samuel Simon Sofia Stella Sybil Thomas Tom "
    "Ursula Vera Victor Walter William Yuri Zelda "
).split()
HELD = ["has", "holds", "keeps", "owns"]


@dataclass
class Sample:
    """Token ids of one training sequence, and how much each token counts in the loss."""

    ids: list[int]
    weights: list[float]

    def cut(self, length: int) -> Sample:
        """Return the first `length` tokens."""
        return Sample(self.ids[:length], self.weights[:length])


def read_books(folder: Path) -> tuple[list[str], list[str]]:
    """Return the first nine tenths of each book for training, and the last tenths for evaluation."""
    train, held_out = [], []
    for name in BOOKS:
        text = (folder / f"{name}.txt").read_text(encoding="utf-8").replace("\r", "")
        cut = len(text) * 9 // 10
        train.append(text[:cut])
        held_out.append(text[cut:])
    return train, held_out


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = " ".join(f"{name} {verb}" for name in NAMES for verb in HELD)
    tokenizer.train_from_iterator([*texts, *[names] * 20, "Note: Question: Answer: " * 200], trainer)
    return tokenizer


class Source:
    """Draws training and evaluation sequences from one part of the books.

    Parameters
    ----------
    tokenizer : Tokenizer
        Of the model.
    texts : list of str
        Books, or the held-out parts of them.
    seed : int
        Of every draw.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.books = [np.array(tokenizer.encode(text).ids, dtype=np.int32) for text in texts]
        self.share = np.array([len(book) for book in self.books], dtype=float)
        self.share /= self.share.sum()
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.vocabulary = tokenizer.get_vocab_size()

    def text(self, length: int) -> list[int]:
        """Return `length` consecutive tokens of a book."""
        book = self.books[self.numpy.choice(len(self.books), p=self.share)]
        start = int(self.numpy.integers(0, len(book) - length))
        return book[start : start + length].tolist()

    def book(self, length: int) -> Sample:
        """Return plain book text."""
        return Sample(self.text(length), [1.0] * length)

    def repeats(self, length: int, period: int | None = None) -> Sample:
        """Return a repeated passage of random tokens; only the repeats count. A short period teaches no copying."""
        period = self.random.randint(length // 8, length // 2) if period is None else period
        once = self.numpy.integers(1, self.vocabulary, period).tolist()
        ids = (once * (length // period + 1))[:length]
        return Sample(ids, [0.0] * period + [1.0] * (length - period))

    def repeated_text(self, length: int) -> Sample:
        """Return book text in which a passage is repeated later."""
        passage = self.text(max(8, length // 5))
        first = self.random.randint(0, length // 5)
        ids = self.text(first) + passage if first else list(passage)
        rest = length - len(ids) - len(passage)
        ids = (ids + self.text(max(rest, 1)) + passage)[:length]
        return Sample(ids, [1.0] * length)

    def facts(self, count: int) -> list[tuple[str, str, str]]:
        """Return names, verbs and three-digit values, no name twice."""
        return [
            (name, self.random.choice(HELD), f"{self.random.randint(0, 999):03d}")
            for name in self.random.sample(NAMES, count)
        ]

    def episode(self, length: int, weight: float = 6.0) -> Sample:
        """Return book text with facts planted early and asked for later; the values of the answers count more."""
        count = max(1, min(8, self.random.randint(1, max(1, length // 32))))
        facts = self.facts(count)
        questions = [self.random.choice(facts) for _ in range(max(1, length // 48))]
        planted = [self.encode(plant(*fact)) for fact in facts]
        asked = [self._asked(fact, weight) for fact in questions]
        filler = max(0, length - sum(map(len, planted)) - sum(len(sample.ids) for sample in asked))
        early = self._gaps(int(filler * self.random.uniform(0, 0.4)), len(planted))
        late = self._gaps(filler - sum(early), len(asked))
        sample = Sample([], [])
        for gap, ids in zip(early, planted, strict=True):
            self._extend(sample, self.text(gap) if gap else [], ids)
        for gap, answer in zip(late, asked, strict=True):
            self._extend(sample, self.text(gap) if gap else [], [])
            sample.ids += answer.ids
            sample.weights += answer.weights
        if len(sample.ids) < length:
            self._extend(sample, self.text(length - len(sample.ids)), [])
        return sample.cut(length)

    def exam(self, distance: int, facts: int = 3) -> tuple[list[int], list[int]]:
        """Return a prompt that ends with a question, and the tokens of the value that is asked for.

        The fact asked for lies `distance` tokens before the question, the others close to it.
        """
        chosen = self.facts(facts)
        lead = self.text(8)
        body = [token for fact in chosen[1:] for token in self.encode(plant(*fact))]
        prompt = lead + self.encode(plant(*chosen[0])) + body
        name, verb, value = chosen[0]
        prompt += self.text(max(1, distance - len(body))) + self.encode(ask(name, verb))
        return prompt, self.encode(f" {value}")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _asked(self, fact: tuple[str, str, str], weight: float) -> Sample:
        name, verb, value = fact
        question, answer = self.encode(ask(name, verb)), self.encode(f" {value}")
        end = self.encode(".\n")
        weights = [1.0] * len(question) + [weight] * len(answer) + [1.0] * len(end)
        return Sample(question + answer + end, weights)

    def _extend(self, sample: Sample, filler: list[int], planted: list[int]) -> None:
        sample.ids += filler + planted
        sample.weights += [1.0] * (len(filler) + len(planted))

    def _gaps(self, total: int, parts: int) -> list[int]:
        cuts = sorted(self.random.randint(0, total) for _ in range(parts - 1))
        return [after - before for before, after in zip([0, *cuts], [*cuts, total], strict=True)]


def plant(name: str, verb: str, value: str) -> str:
    """Return the sentence that states a fact."""
    return f"\nNote: {name} {verb} {value}.\n"


def ask(name: str, verb: str) -> str:
    """Return the question for a fact, up to its value."""
    return f"\nQuestion: what {verb} {name}? Answer: {name} {verb}"
