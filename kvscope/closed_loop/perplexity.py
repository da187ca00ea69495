"""Perplexity of text files under a cache limit: the protocol of papers that report perplexity."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvscope.closed_loop.job import ClosedLoopJob
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.options import OutputOptions, PerplexityOptions
from kvscope.core.records import SequenceRef, SourceRef, TextRef
from kvscope.engine.provenance import replay_record
from kvscope.engine.runs import RunSpec
from kvscope.model.loading import Loaded
from kvscope.model.selfcheck import self_check
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import TokenSequence

DEFAULT_WINDOW = 1024
FEWEST = 8  # a last window of this many tokens or fewer is dropped


@dataclass(frozen=True)
class PerplexityJob:
    """A measurement of perplexity whose input has been checked.

    Attributes
    ----------
    closed : ClosedLoopJob
        The runs over the windows of all texts.
    source : SourceRef
        Description of the texts in ``run.json``.
    """

    closed: ClosedLoopJob
    source: SourceRef

    @property
    def runs(self) -> Sequence[RunSpec]:
        """Every run."""
        return self.closed.runs

    def execute(self, output: OutputOptions, progress_callback: Callable[[float], None] | None = None) -> Replay:
        """Execute the job and return the results that were written to `output`.

        Raises
        ------
        ReplayError
            If a loss is not finite.
        OutputExists, ResultError
            If the output exists, or cannot be written.
        """
        started, job = time.monotonic(), self.closed
        sequences = [passage.sequence for passage in job.passages]
        device = str(job.model.get_input_embeddings().weight.device)
        record = replay_record(
            self.source, sequences, job.runs, job.metrics, job.prefill, output.command, device=device
        )
        with ReplayWriter(output.path, record, force=output.force) as writer:
            tally = job.execute(writer, progress_callback)
            counted = {run.number: tally.of(run.number) for run in job.runs}
            return writer.finish(counted, seconds=round(time.monotonic() - started, 3))


def passages_of_texts(
    loaded: Loaded, texts: Mapping[Path, str], options: PerplexityOptions
) -> tuple[list[Passage], int]:
    """Return the windows of all texts, and the number of tokens of a window.

    Raises
    ------
    UsageError
        If a text is too short, or a window is larger than the context or not larger than the prompt.
    """
    size, prompt = _window(loaded, options.window, options.prompt), options.prompt
    found: list[Passage] = []
    for file, text in texts.items():
        for number, ids in enumerate(_windows(loaded, text, size)):
            if options.max_windows is not None and number >= options.max_windows:
                break
            if len(ids) > max(prompt, FEWEST):
                found.append(Passage(TokenSequence(len(found), prompt, len(ids), True), torch.tensor(ids)))
        if not found or len(found[-1].ids) <= prompt:
            raise UsageError(
                f"text {file} has too few tokens", f"Use a text of more than {max(prompt, FEWEST)} tokens."
            )
    return found, size


def describe_texts(loaded: Loaded, texts: Mapping[Path, str], passages: Sequence[Passage], window: int) -> SourceRef:
    """Return the entry of texts in ``run.json``; raises ModelError if the model's attention cannot be observed."""
    files = list(texts)
    with torch.inference_mode():
        facts = self_check(loaded.model, passages[0].ids[None].to(loaded.device))
    if facts.heads % facts.kv_heads:
        raise ModelError(f"{loaded.name} has {facts.heads} heads over {facts.kv_heads}", "Use another model.")
    identity = hashlib.sha256(f"{loaded.source} {loaded.revision}".encode())
    for passage in passages:
        identity.update(passage.ids.numpy().tobytes())
    return SourceRef(
        name=Path(files[0]).stem if len(files) == 1 else f"{Path(files[0]).stem}+{len(files) - 1}-more",
        kind="text",
        identity=identity.hexdigest(),
        model=loaded.name,
        sequences=tuple(SequenceRef(p.sequence.prompt, p.sequence.length) for p in passages),
        layers=tuple(sorted(facts.windows)),
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        protocol="text",
        window=window,
        texts=tuple(TextRef(str(file), hashlib.sha256(text.encode()).hexdigest()) for file, text in texts.items()),
    )


def _window(loaded: Loaded, window: int | None, prompt: int) -> int:
    context = loaded.context
    size = window or min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if context is not None and size > context:
        raise UsageError(f"a window of {size} tokens is more than the model's context of {context}", "Lower --window.")
    if not 1 <= prompt < size:
        raise UsageError(f"a prompt of {prompt} tokens fills a window of {size}", "Lower --prompt-length.")
    return size


def _windows(loaded: Loaded, text: str, size: int) -> Iterator[list[int]]:
    tokenizer = loaded.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [tokenizer.bos_token_id] if tokenizer("", verbose=False)["input_ids"][:1] else []
    step = size - len(first)
    for start in range(0, len(ids), step):
        yield first + ids[start : start + step]
