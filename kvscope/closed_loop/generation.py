"""Generation under a policy: what the model says when evicted keys are removed from its cache, and how right it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from kvscope.closed_loop.cache_changes import CacheChanges
from kvscope.closed_loop.decode import DecodeJob
from kvscope.closed_loop.job import ClosedLoopJob
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.prompt_pass import PromptPass
from kvscope.core.answer_records import ExampleRef
from kvscope.core.memory import memory_explained
from kvscope.core.model_types import Tokenizer
from kvscope.core.progress import Progress, part_of
from kvscope.core.records import SourceRef
from kvscope.engine.examples import examples_of
from kvscope.engine.runs import RunSpec, by_plan
from kvscope.model.prompts import token_texts
from kvscope.model.selfcheck import AttentionFacts
from kvscope.model.short_cache import holds_keys_alone
from kvscope.model.token_kinds import kinds_of_ids
from kvscope.tasks.scoring import score
from kvscope.trace.reader import Trace


class AnswerSink(Protocol):
    """Receives what the model says."""

    def answer(self, run: int, sequence: int, text: str, tokens: int, score: float) -> None:
        """Receive the text that a run generated after the prompt of a sequence, its tokens, and its score, 0 to 1."""


@dataclass(frozen=True)
class GenerateJob:
    """Prompts to continue under the runs of a closed loop, all checked.

    Attributes
    ----------
    closed : ClosedLoopJob
        The runs over the sequences of the trace.
    facts : AttentionFacts
        Facts about the model's attention.
    examples : sequence of ExampleRef
        The sequences that have right answers; the others are not continued.
    tokenizer : Tokenizer
        Of the model.
    stops : frozenset of int
        Tokens that end a text.
    max_new_tokens : int or None
        Tokens to generate after each prompt at most; None is as many as the trace has after it.
    """

    closed: ClosedLoopJob
    facts: AttentionFacts
    examples: Sequence[ExampleRef]
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_new_tokens: int | None = None

    def scored_as(self, source: SourceRef) -> SourceRef:
        """Return the entry of the trace in ``run.json``, with the metrics by which answers are scored here."""
        return replace(source, examples=tuple(self.examples))

    def execute(self, sink: AnswerSink, progress_callback: Progress | None = None) -> None:
        """Generate greedily after every prompt under every run; `sink` gets the texts and scores.

        Raises
        ------
        ModelError
            If a layer does not attend to the keys and values that it caches.
        ReplayError
            If a policy evicted nothing although it had to.
        """
        runs, done = self.closed.runs, 0
        for example in self.examples:
            passage, read = self.closed.passages[example.sequence], PromptPass()
            for together in self._batches(passage):
                what = f" with {together[0].label}"
                part = part_of(progress_callback, done, done + len(together), len(runs) * len(self.examples))
                with memory_explained(what, "Use --device cpu, --dtype float32, fewer budgets, or shorter prompts."):
                    texts = self.generated(passage, together, read, part)
                for run, made in zip(together, texts, strict=True):
                    text = self._text(passage, made)
                    right = score(example.metric, text, example.answers, example.classes)
                    sink.answer(run.number, example.sequence, text, len(made), right)
                done += len(together)
                if part is not None:
                    part(1)

    def most_tokens(self, sequence: int) -> int:
        """Return how many tokens are generated after the prompt of a sequence at most."""
        traced = self.closed.passages[sequence].sequence
        return traced.length - traced.prompt if self.max_new_tokens is None else self.max_new_tokens

    def _batches(self, passage: Passage) -> list[list[RunSpec]]:
        """Return the runs that generate as one batch: the budgets of one policy, cache and merging rule.

        Each run is alone where the model keeps more of a text than keys and values, or the prompt has images: what it
        keeps of these is for one entry of a batch.
        """
        plans = by_plan(self.closed.runs)
        if passage.images or not holds_keys_alone(self.closed.model):
            return [[run] for run in self.closed.runs]
        return plans

    def generated(
        self,
        passage: Passage,
        runs: Sequence[RunSpec],
        read: PromptPass | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Return the tokens that runs of one plan generate after the prompt of a text, as one batch.

        A token that ends the text is not among them. The budget is that of the closed run: a share of the prompt, or
        with streaming prefill of the traced sequence. `read` is shared by the runs of one text, so that the model reads
        its prompt once. `progress` is called after every token.
        """
        job, sequence = self.closed, passage.sequence
        prompt = sequence.prompt
        ids = torch.zeros(len(runs), prompt + self.most_tokens(sequence.index), dtype=torch.int64)
        ids[:, :prompt] = passage.ids[:prompt]
        ids = ids.to(job.model.get_input_embeddings().weight.device)
        keys, index = [run.keys(sequence, job.prefill) for run in runs], sequence.index
        reads_kinds = "token_kinds" in runs[0].plan.needs
        given = job.given.generating(index, prompt, self._kinds_of_ids) if reads_kinds else job.given
        about = prompt, job.prefill, index, self.facts, job.rotary, passage, given
        changes = CacheChanges.of(runs[0], job.unrotated)
        decoding = DecodeJob(job.model, ids, runs[0].plan, keys, *about, changes)
        return decoding.generate(self.stops, read, progress)

    @cached_property
    def _kinds_of_ids(self) -> torch.Tensor:
        """The class of every token of the model by its number, ``[V]``."""
        embeddings = self.closed.model.get_input_embeddings().weight
        return kinds_of_ids(self.tokenizer, len(embeddings)).to(embeddings.device)

    def _text(self, passage: Passage, made: Sequence[int]) -> str:
        """Return the text that generated tokens add to a prompt, as a trace has it."""
        prompt = passage.ids[: passage.sequence.prompt].tolist()
        return "".join(token_texts(self.tokenizer, [*prompt, *made])[len(prompt) :])


def examples_to_generate(trace: Trace, metric: str | None) -> list[ExampleRef]:
    """Return the sequences of a trace that have right answers, to be scored by `metric` if that is given.

    Raises
    ------
    UsageError
        If a metric is unknown, or needs a package that is not installed.
    """
    examples = [example if metric is None else replace(example, metric=metric) for example in examples_of(trace)]
    for example in examples:
        score(example.metric, "", ["a"], example.classes)  # raises before anything is computed
    return examples
