"""A recording that has been checked and measured, and not begun."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvscope.core.options import OutputOptions
from kvscope.core.recording_options import Sampling, StoreOptions, TextOptions
from kvscope.model.explain import memory_explained
from kvscope.model.loading import Loaded
from kvscope.model.pipeline import IN_FLIGHT, Pipeline, threads_for
from kvscope.model.prompts import Prompt
from kvscope.model.recorder import Recorder
from kvscope.model.run import Progress, RecordingRun
from kvscope.model.sampling import chooser
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import TraceHeader
from kvscope.trace.writer import TraceWriter


@dataclass(frozen=True)
class RecordingPlan:
    """All that is known of a recording before the first token: see `compile_recording`.

    Attributes
    ----------
    loaded : Loaded
        The model.
    prompts : tuple of Prompt
        What it reads, as tokens.
    header : TraceHeader
        What ``trace.json`` will say.
    output : OutputOptions
        Where the trace goes, and whether one that is there is replaced.
    text, store, sampling
        The choices, with the layers, heads and layer inputs that they come to.
    query_block : int
        Queries whose rows exist at a time.
    tokens : int
        Tokens of all sequences, at most.
    bytes, free : int
        Bytes that it takes about, and that are free there.
    others : dict of str to int
        Bytes that the other stores would take about.
    in_flight : int
        Bytes that wait to be written at most, beside what files collect for a block of rows.
    """

    loaded: Loaded
    prompts: tuple[Prompt, ...]
    header: TraceHeader
    output: OutputOptions
    text: TextOptions
    store: StoreOptions
    sampling: Sampling
    query_block: int
    tokens: int
    bytes: int
    free: int
    others: dict[str, int]
    in_flight: int = IN_FLIGHT

    @property
    def path(self) -> Path:
        """Where the trace goes."""
        return self.output.path

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self.prompts)

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens of a prompt that go through the model at a time, where one has more than that."""
        return self.header.prefill_chunk

    def execute(self, progress_callback: Callable[[Progress], None] | None = None) -> Trace:
        """Return the trace, recorded now.

        Parameters
        ----------
        progress_callback : callable, optional
            Called with `Progress` after every forward pass.

        Raises
        ------
        ModelError
            If memory runs out, or a layer does not show what is to be recorded.
        TraceError
            If the trace exists, or cannot be written.
        """
        with (
            torch.inference_mode(),
            memory_explained(self.loaded.name),
            TraceWriter(self.path, self.header, force=self.output.force) as writer,
        ):
            with Pipeline(threads_for(self.loaded.device)) as pipeline:
                recorder = Recorder(
                    writer,
                    self.header.layers,
                    self.query_block,
                    store=self.store.store,
                    hidden=bool(self.store.hidden),
                    heads=self.header.head_numbers,
                    query_stride=self.store.query_stride,
                    pipeline=pipeline,
                )
                run = RecordingRun(self.loaded, writer, recorder, self.prefill_chunk, self.tokens, progress_callback)
                done = [
                    run.record(n, prompt, self.text.max_new_tokens, chooser(self.sampling, self.text.seed + n))
                    for n, prompt in enumerate(self.prompts)
                ]
            writer.finish(done)
        return open_trace(self.path)
