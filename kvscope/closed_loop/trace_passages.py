"""The model and the passages of a trace, for the closed loop."""

from __future__ import annotations

from pathlib import Path

import torch

from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.trace_images import images_of
from kvscope.core.errors import ModelError, TraceError
from kvscope.core.options import ClosedLoopOptions, ModelSource
from kvscope.model.loading import Loaded, load
from kvscope.model.quantised import at_loading
from kvscope.model.token_ids import TextEncoder
from kvscope.trace.reader import Trace
from kvscope.trace.token_kinds import token_kinds

CLOSED_LOOP = "the closed loop"


def load_model_of(trace: Trace, options: ClosedLoopOptions, device: str = "cpu", what: str = CLOSED_LOOP) -> Loaded:
    """Return the model that a trace was recorded with.

    Parameters
    ----------
    trace : Trace
        The trace.
    options : ClosedLoopOptions
        How the model is loaded.
    device : str
        Where to.
    what : str
        What needs the model, for messages.

    Raises
    ------
    TraceError
        If the trace does not name a model, or lacks layers or heads.
    ModelError
        If the model cannot be loaded.
    """
    name = options.model or trace.header.model.id
    instead = "omit --perplexity" if what == CLOSED_LOOP else "use other policies"
    if trace.header.source != "model" or not name:
        raise TraceError(
            f"{trace.path} was imported and has no model, which {what} needs",
            f"Record a trace with kvscope trace, or {instead}.",
        )
    if name == trace.header.model.class_name and not Path(name).is_dir():
        raise TraceError(
            f"{trace.path} was recorded from a loaded {name} without a name, and {what} loads models by name",
            "Name the model or its folder with --model.",
        )
    header = trace.header
    if header.rows_from == "module":
        raise TraceError(
            f"{trace.path} holds the rows that the modules of {header.model.class_name} returned: policies cannot run "
            "inside its attention",
            "Replay it in the open loop: kvscope replay without --perplexity.",
        )
    if not header.whole:
        attended = header.n_layers - len(header.other_layers)
        raise TraceError(
            f"{trace.path} holds {len(trace.layers)} of {attended} layers, and {what} needs all",
            "Record it again without --layers.",
        )
    if trace.header.head_numbers:
        raise TraceError(
            f"{trace.path} holds {trace.heads} of {trace.header.n_heads} query heads, and {what} needs all",
            "Record it again without --heads.",
        )
    revision = None if options.model else trace.header.model.revision
    quantize = None if options.model else at_loading(header.model.quantization)
    return load(ModelSource(str(name), revision, options.dtype, device, options.device_map, quantize=quantize))


def passages_of(trace: Trace, loaded: Loaded) -> list[Passage]:
    """Return the tokens of each sequence of a trace; raises ModelError if the model's vocabulary lacks some of them."""
    vocabulary, encoder = loaded.text_config.vocab_size, TextEncoder(loaded.tokenizer)
    passages = []
    for sequence in trace.sequences:
        tokens = trace.tokens(sequence.index)
        if tokens["token_id"].max() >= vocabulary:
            raise ModelError(
                f"model {loaded.name} has {vocabulary} tokens, and the trace has token {tokens['token_id'].max()}",
                "Give the model that was traced with --model.",
            )
        ids = torch.from_numpy(tokens["token_id"].to_numpy().astype("int64"))
        prefix = len(encoder.prefix) if encoder.writes_prefix(ids.tolist()) else 0
        images = images_of(trace, loaded, sequence.index, ids)
        readings: dict[int, torch.Tensor] = {}
        if "reconstruction" in trace.stored:
            read = {layer: trace.key_numbers("reconstruction", sequence.index, layer) for layer in trace.layers}
            readings = {layer: torch.from_numpy(largest) for layer, largest in read.items()}
        known = "token_kinds" in trace.stored
        kinds = torch.from_numpy(token_kinds(trace, sequence.index)) if known else None
        passages.append(Passage(sequence, ids, tokens["logprob"].to_numpy(), prefix, images, readings, kinds))
    return passages
