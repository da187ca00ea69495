"""The public function that records a trace of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvscope.core.json import Json
from kvscope.core.model_types import CausalModel, Tokenizer
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import BlockOptions, ImageOptions, Sampling, StoreOptions, TextOptions
from kvscope.model.compile import compile_recording, default_output
from kvscope.model.plan import RecordingPlan
from kvscope.model.run import Progress
from kvscope.trace.reader import Trace


def trace(
    model: str | tuple[CausalModel, Tokenizer],
    prompts: Sequence[Path | str],
    *,
    output: Path | None = None,
    continuation: Path | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    query_stride: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    chat: bool = False,
    system: str | None = None,
    chat_options: Mapping[str, Json] | None = None,
    answers: Sequence[str] = (),
    images: Sequence[Path | str] = (),
    field: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    query_block: int = 128,
    prefill_chunk: int | None = None,
    store: str = "maps",
    hidden: bool | None = None,
    outputs: bool = False,
    reread: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[RecordingPlan], None] | None = None,
) -> Trace:
    """Record the attention of a model that reads prompts and continues them, and return the trace.

    Parameters
    ----------
    model : str or (model, tokenizer)
        A Hub id, a local folder or ``demo``; or a loaded model with its tokenizer.
    prompts, images, output
        Files of texts, as `kvscope.model.prompt_files.read_prompts` describes them; files of images, for one prompt;
        folder of the trace, by default ``traces/PROMPT-MODEL``.
    progress, announce : callable, optional
        Called with `Progress` after every forward pass; with the `RecordingPlan` before the first one.
    other parameters
        Fields of `ModelSource`, `TextOptions`, `StoreOptions`, `Sampling` and `BlockOptions`, which describe them.
    """
    source = ModelSource(model, revision, dtype, device, device_map, trust_remote_code, quantize)
    place = OutputOptions(default_output(source, prompts) if output is None else Path(output), force, command)
    given = _given(answers, images)
    text = TextOptions(continuation, chat, max_new_tokens, seed, field, system, chat_options or {}, *given)
    kept = StoreOptions(store, _numbers(layers), _numbers(heads), query_stride, hidden, outputs, reread)
    sampling, blocks = Sampling(do_sample, temperature, top_p, top_k), BlockOptions(query_block, prefill_chunk)
    plan = compile_recording(source, prompts, place, text=text, store=kept, sampling=sampling, blocks=blocks)
    return _executed(plan, progress, announce)


def _executed(
    plan: RecordingPlan,
    progress: Callable[[Progress], None] | None,
    announce: Callable[[RecordingPlan], None] | None,
) -> Trace:
    if announce is not None:
        announce(plan)
    return plan.execute(progress)


def _given(answers: Sequence[str], images: Sequence[Path | str]) -> tuple[tuple[str, ...], ImageOptions]:
    return tuple(answers), ImageOptions(tuple(map(str, images)))


def _numbers(selected: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if selected is None else tuple(selected)
