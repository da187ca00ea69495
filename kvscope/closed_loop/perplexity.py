"""Perplexity of text files under a cache limit: the protocol of papers that report perplexity."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from kvscope.closed_loop.job import ClosedLoopJob
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.core.near_copies import clusters
from kvscope.core.options import OutputOptions, PerplexityOptions
from kvscope.core.records import SequenceRef, SourceRef, TextRef
from kvscope.core.text_names import text_name
from kvscope.engine.provenance import head_counts, replay_record
from kvscope.engine.runs import RunSpec
from kvscope.model.loading import Loaded
from kvscope.model.selfcheck import self_check
from kvscope.model.token_ids import TextEncoder, windows
from kvscope.model.token_kinds import kinds_of_text
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
    notes : tuple of str
        What the user should know about the windows.
    """

    closed: ClosedLoopJob
    source: SourceRef
    notes: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class TextWindows:
    """The windows of texts.

    Attributes
    ----------
    passages : list of Passage
        The windows of all texts, in order.
    size : int
        Tokens of a window.
    dropped : dict of Path to int
        For each text, the tokens of its last window if that is too short to be scored, without those that begin every
        window; otherwise 0.
    """

    passages: list[Passage]
    size: int
    dropped: dict[Path, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for every text whose last tokens are not scored."""
        return tuple(
            f"{file}: its last {count} tokens are not scored: they are too few for a window"
            for file, count in self.dropped.items()
            if count
        )


def passages_of_texts(
    loaded: Loaded, texts: Mapping[Path, str], options: PerplexityOptions, *, kinds: bool = False
) -> TextWindows:
    """Return the windows of all texts, on request with the classes of their tokens.

    Raises
    ------
    UsageError
        If a text is too short, or a window is larger than the context or not larger than the prompt.
    """
    size, prompt = _window(loaded, options.window, options.prompt), options.prompt
    encoder, fewest = TextEncoder(loaded.tokenizer), max(prompt, FEWEST)
    found: list[Passage] = []
    dropped: dict[Path, int] = {}
    for file, text in texts.items():
        ids = encoder.without_prefix(encoder.encode(text))
        parts = list(islice(windows(encoder, ids, size), options.max_windows))
        scored = [part for part in parts if len(part) > fewest]
        if not scored:
            raise UsageError(f"text {file} has too few tokens", f"Use a text of more than {fewest} tokens.")
        dropped[file] = sum(len(part) - len(encoder.prefix) for part in parts[len(scored) :])
        for part in scored:
            sequence = TokenSequence(len(found), prompt, len(part), True)
            classes = kinds_of_text(loaded.tokenizer, part) if kinds else None
            found.append(Passage(sequence, torch.tensor(part), prefix=len(encoder.prefix), kinds=classes))
    return TextWindows(found, size, dropped)


def describe_texts(loaded: Loaded, texts: Mapping[Path, str], read: TextWindows) -> SourceRef:
    """Return the entry of texts in ``run.json``; raises ModelError if the model's attention cannot be observed."""
    files, passages = list(texts), read.passages
    with torch.inference_mode():
        facts = self_check(loaded.model, passages[0].ids[None].to(loaded.device))
    identity = hashlib.sha256(f"{loaded.source} {loaded.revision}".encode("utf-8", "surrogateescape"))
    for passage in passages:
        identity.update(passage.ids.numpy().tobytes())
    return SourceRef(
        name=text_name(files[0]) if len(files) == 1 else f"{text_name(files[0])}+{len(files) - 1}-more",
        kind="text",
        identity=identity.hexdigest(),
        model=loaded.name,
        sequences=tuple(SequenceRef(p.sequence.prompt, p.sequence.length) for p in passages),
        layers=tuple(sorted(facts.windows)),
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        layer_heads=head_counts([facts.sizes[layer] for layer in sorted(facts.windows)]),
        latent_size=facts.latent_size,
        shared_cache={str(layer): owner for layer, owner in facts.shared.items()},
        protocol="text",
        near_copies=clusters([passage.ids.tolist() for passage in passages]),
        window=read.size,
        texts=tuple(
            TextRef(str(file), hashlib.sha256(text.encode()).hexdigest(), read.dropped[file])
            for file, text in texts.items()
        ),
    )


def _window(loaded: Loaded, window: int | None, prompt: int) -> int:
    context = loaded.context
    size = window or min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if context is not None and size > context:
        raise UsageError(f"a window of {size} tokens is more than the model's context of {context}", "Lower --window.")
    if size <= FEWEST:
        raise UsageError(f"a window of {size} tokens is too short", f"Give --window more than {FEWEST} tokens.")
    if not 1 <= prompt < size:
        raise UsageError(f"a prompt of {prompt} tokens fills a window of {size}", "Lower --prompt-length.")
    return size
