"""A recording that is checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kvscope.core.options import OutputOptions
from kvscope.core.recording_options import Sampling, StoreOptions, TextOptions
from kvscope.model.explain import memory_explained
from kvscope.model.loading import Loaded
from kvscope.model.module_maps import MapRecorder
from kvscope.model.outputs import OutputProjection
from kvscope.model.pipeline import Pipeline, limit_for, threads_for
from kvscope.model.prompts import Prompt
from kvscope.model.recorder import Recorder
from kvscope.model.run import Progress, RecordingRun
from kvscope.model.sampling import chooser
from kvscope.model.second_reading import second_reading
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import TraceHeader
from kvscope.trace.writer import TraceWriter


@dataclass(frozen=True)
class RecordingPlan:
    """A compiled recording, as `compile_recording` returns it.

    Attributes
    ----------
    loaded : Loaded
        The model.
    prompts : tuple of Prompt
        The prompts as tokens.
    header : TraceHeader
        Header of the trace.
    output : OutputOptions
        Folder of the trace, and whether an existing one is replaced.
    text, store, sampling
        The options; `store` with the selected layers and heads, and whether layer inputs are stored.
    query_block : int
        Queries whose rows are computed at a time.
    tokens : int
        Upper bound on the tokens of all sequences.
    bytes, free : int
        Estimated bytes of the trace, and free bytes of the disk.
    others : dict of str to int
        Estimated bytes for each of the other stores.
    automatic : bool
        Whether the store was chosen by the size of the trace.
    projections : mapping of int to OutputProjection
        Output projection of each layer, if norms of values after it are recorded.
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
    projections: Mapping[int, OutputProjection] = field(default_factory=dict)
    automatic: bool = False

    @property
    def path(self) -> Path:
        """Folder of the trace."""
        return self.output.path

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.prompts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the model's settings and the prompts' token ids."""
        return self.loaded.notes + tuple(note for prompt in self.prompts for note in prompt.notes)

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens of a prompt per forward pass; None if every prompt is read in one pass."""
        return self.header.prefill_chunk

    @property
    def in_flight(self) -> int:
        """Limit on the bytes that wait to be written, without those that files buffer for a row group."""
        return limit_for(threads_for(self.loaded.device))

    def execute(self, progress_callback: Callable[[Progress], None] | None = None) -> Trace:
        """Run the recording and return the trace.

        Parameters
        ----------
        progress_callback : callable, optional
            Called with `Progress` after every forward pass.

        Raises
        ------
        ModelError
            If memory runs out, or the store cannot represent the attention of a layer.
        TraceError
            If the trace exists or cannot be written.
        """
        with (
            torch.inference_mode(),
            memory_explained(self.loaded.name),
            TraceWriter(self.path, self.header, force=self.output.force) as writer,
        ):
            with Pipeline(threads_for(self.loaded.device)) as pipeline:
                recorder = self._recorder(writer, pipeline)
                reread = self._reread(writer) if self.store.reread else None
                asked = self.prefill_chunk, self.tokens, progress_callback, reread
                run = RecordingRun(self.loaded, writer, recorder, *asked)
                done = [
                    run.record(n, prompt, self.text.max_new_tokens, chooser(self.sampling, self.text.seed + n))
                    for n, prompt in enumerate(self.prompts)
                ]
            writer.finish(done)
        return open_trace(self.path)

    def _reread(self, writer: TraceWriter) -> Callable[[int, Sequence[int], int], None]:
        """Return what lets the model read the prompt of a sequence again, and writes what it attends to."""

        def write(sequence: int, prompt: Sequence[int], length: int) -> None:
            found = second_reading(self.loaded, prompt)
            for layer in self.header.layers:
                own = found[layer][_kv_heads(self.header, layer)].float().cpu().numpy()
                largest = np.pad(own, ((0, 0), (0, length - len(prompt))))
                writer.key_numbers("readings", layer, sequence, 0, reconstruction=largest)

        return write

    def _recorder(self, writer: TraceWriter, pipeline: Pipeline) -> Recorder | MapRecorder:
        heads, stride = self.header.head_numbers, self.store.query_stride
        if self.header.rows_from == "module":
            return MapRecorder(
                writer,
                self.header.layers,
                self.query_block,
                heads=heads,
                query_stride=stride,
                indexed=self.header.indexed,
                pipeline=pipeline,
            )
        return Recorder(
            writer,
            self.header.layers,
            self.query_block,
            store=self.store.store,
            hidden=bool(self.store.hidden),
            heads=heads,
            query_stride=stride,
            vector_dtype=self.header.vector_dtype,
            projections=self.projections,
            pipeline=pipeline,
        )


def _kv_heads(header: TraceHeader, layer: int) -> list[int]:
    """Return the key/value heads of a layer that are recorded."""
    if not header.head_numbers:
        return list(range(header.heads_of(layer).kv_heads))
    group = len(header.head_numbers) // header.heads_of(layer).kv_heads
    return sorted({head // group for head in header.head_numbers})
