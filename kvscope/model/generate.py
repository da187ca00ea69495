"""Generate with a real model and record its trace: the public function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvscope.core.model_types import CausalModel, Tokenizer
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import BlockOptions, Sampling, StoreOptions, TextOptions
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
    trust_remote_code: bool = False,
    query_block: int = 128,
    prefill_chunk: int | None = None,
    store: str = "maps",
    hidden: bool | None = None,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[RecordingPlan], None] | None = None,
) -> Trace:
    """Return the recorded trace of a model that reads prompts and continues them.

    Parameters
    ----------
    model : str, or tuple of a model and its tokenizer
        ``demo``, an alias (``llama2-7b``), a Hub id, a local folder, or a pair that transformers has loaded: the trace
        then names the model as its configuration does (``name_or_path``), or by its class.
    prompts : sequence of Path
        Text files, one sequence each, or ``.jsonl`` files with a ``prompt`` (and perhaps a ``continuation``) per line.
    output : Path, optional
        Folder of the trace; ``traces/NAME`` by default.
    continuation : Path, optional
        Text that is forced after every prompt instead of generating (teacher forcing).
    layers : sequence of int, optional
        Layers to record; all by default.
    heads : sequence of int, optional
        Query heads to record, in whole groups that share keys and values; all by default.
    query_stride : int
        Every how many-th row of attention to record. Such a trace can be read, and not be replayed.
    max_new_tokens : int
        Tokens after the prompt, at most.
    seed, do_sample, temperature, top_p, top_k
        Sampling, as in transformers; the likeliest token by default.
    dtype, device, device_map, revision, trust_remote_code
        How the model is loaded, as in transformers; not for a loaded pair.
    chat : bool
        Whether to wrap each prompt in the model's chat template.
    query_block : int
        Queries whose rows exist at a time.
    prefill_chunk : int, optional
        Tokens of a prompt that go through the model at a time; by default as many as bound the memory for logits.
    store : str
        ``maps``; ``maps+vectors``: also the queries, keys and values of every token, exactly (`Trace.states`); or
        ``qkv``: these alone, which grow with the length and not with its square, and from which the trace recomputes
        the rest when it is read; or ``topk:64``: the 64 heaviest keys of every row and sums of columns, from which the
        trace rebuilds rows approximately, and says so.
    hidden : bool, optional
        Whether to record layer inputs too, from which gates decide; by default where a gate lies beside the model, as
        it does beside ``demo``.
    force : bool
        Whether to replace an existing trace.
    command : str, optional
        The command line, for the provenance.
    progress, announce : callable, optional
        Called with `Progress` while it runs, and with the `RecordingPlan` before it starts.

    Raises
    ------
    UsageError
        An empty prompt, one that does not fit the context, an unknown layer, a bad setting.
    ModelError
        The model cannot be loaded or watched, or the self-check fails.
    TraceError
        The trace exists, or the disk cannot hold it.
    """
    source = ModelSource(model, revision, dtype, device, device_map, trust_remote_code)
    plan = compile_recording(
        source,
        prompts,
        OutputOptions(default_output(source, prompts) if output is None else Path(output), force, command),
        text=TextOptions(continuation, chat, max_new_tokens, seed),
        store=StoreOptions(store, _numbers(layers), _numbers(heads), query_stride, hidden),
        sampling=Sampling(do_sample, temperature, top_p, top_k),
        blocks=BlockOptions(query_block, prefill_chunk),
    )
    if announce is not None:
        announce(plan)
    return plan.execute(progress)


def _numbers(chosen: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if chosen is None else tuple(chosen)
