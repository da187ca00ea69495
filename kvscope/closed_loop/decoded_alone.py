"""A model's own decoding of a text, with its full cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.closed_loop.passage import Passage
from kvscope.core.model_types import CausalModel
from kvscope.core.progress import Progress
from kvscope.model.image_check import forget_positions
from kvscope.model.short_cache import full_cache


@torch.no_grad()
def decoded_alone(model: CausalModel, passage: Passage, prompt: int, progress: Progress | None = None) -> Tensor:
    """Return the logits ``[T, V]`` of the model's own decoding of a text with its full cache.

    The first `prompt` tokens go through one pass; nothing of the model is replaced. `progress` is called after every
    pass.
    """
    ids = passage.ids[None].to(model.get_input_embeddings().weight.device)
    forget_positions(model)
    cache, starts = full_cache(model), ([0] if prompt else []) + list(range(prompt, ids.shape[1]))
    stops = [*starts[1:], ids.shape[1]]
    parts = []
    for start, stop in zip(starts, stops, strict=True):
        beside = passage.beside(stop) if prompt and not start else {}
        parts.append(model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **beside).logits[0])
        if progress is not None:
            progress(stop / ids.shape[1])
    return torch.cat(parts)
