"""A second reading of a prompt: how much each of its keys is attended to while the model is to repeat the prompt.

As in KVzip (arXiv:2505.23416; code snu-mllab/KVzip, ``score.py`` and ``wrapper.py``): behind the cache of
the prompt the model reads an instruction and the prompt once more, in chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.model_types import Tokenizer
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.loading import Loaded
from kvscope.model.short_cache import full_cache

CHUNK = 2048  # tokens of the prompt that are repeated at a time
SINKS = 4  # first keys that take part in the softmax of every chunk
AGAIN = "\n\nRepeat the previous context exactly.\n"
FROM_HERE = "\n\nRepeat the part of the previous context exactly, starting with"
WITHOUT = "Record the trace without --reread."
LAST = 8  # tokens of the chunk before, which such an instruction ends with


def second_reading(loaded: Loaded, prompt: Sequence[int], chunk: int = CHUNK, todo: str = WITHOUT) -> dict[int, Tensor]:
    """Return for each layer the largest weight that a query of the second reading gives each key, ``[G, P]``.

    The softmax of a query is over the first `SINKS` keys of the prompt, the keys of the chunk that is repeated, and
    those of the second reading up to the query. The maximum is over the queries and over the query heads of a group.

    Parameters
    ----------
    loaded : Loaded
        The model and its tokenizer.
    prompt : sequence of int
        The ``P`` tokens of a prompt.
    chunk : int
        Tokens that are repeated at a time.
    todo : str
        What to do where a layer does not attend to all keys, for the message.

    Raises
    ------
    ModelError
        If a layer does not attend to all keys of the prompt.
    """
    model, device = loaded.model, loaded.device
    cache, scores = full_cache(model), dict[int, list[Tensor]]()
    model(input_ids=torch.tensor([list(prompt)], device=device), past_key_values=cache, use_cache=True)
    for start in range(0, len(prompt), chunk):
        stop = min(start + chunk, len(prompt))
        ids = [*_instruction(loaded.tokenizer, prompt, start), *prompt[start:stop]]

        def observe(call: Call, start: int = start, stop: int = stop) -> None:
            _require_whole(call, len(prompt), loaded.name, todo)
            scores.setdefault(call.layer, []).append(_largest(call, start, stop))

        with observe_attention(model, observe):  # a copy, since not every cache can forget what came last
            model(input_ids=torch.tensor([ids], device=device), past_key_values=copy.deepcopy(cache), use_cache=True)
    return {layer: torch.cat(parts, -1) for layer, parts in scores.items()}


def _instruction(tokenizer: Tokenizer, prompt: Sequence[int], start: int) -> list[int]:
    """Return the tokens that ask for the part of a prompt from `start` on."""
    if not start:
        return list(tokenizer.encode(AGAIN, add_special_tokens=False))
    return [*tokenizer.encode(FROM_HERE, add_special_tokens=False), *prompt[max(0, start - LAST) : start]]


def _largest(call: Call, start: int, stop: int) -> Tensor:
    """Return the largest weight on each key from `start` to `stop` - 1, ``[G, stop - start]``."""
    count, heads = call.query.shape[2], call.key.shape[1]
    first = min(SINKS, start)
    keys = torch.cat([call.key[0, :, :first], call.key[0, :, start:stop], call.key[0, :, -count:]], 1).to(call.exact)
    later = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu(1)
    result = []
    for head, queries in enumerate(call.query[0].view(heads, -1, count, call.query.shape[-1])):
        logits = queries.to(call.exact) @ keys[head].T * call.scaling  # [Q, q, first + chunk + q]
        logits[..., -count:].masked_fill_(later, -torch.inf)
        result.append(logits.softmax(-1)[..., first : first + stop - start].amax((0, 1)))
    return torch.stack(result)


def _require_whole(call: Call, prompt: int, name: str, todo: str = WITHOUT) -> None:
    if call.sliding_window is not None or call.chunk is not None or call.key.shape[2] < prompt + call.query.shape[2]:
        raise ModelError(
            f"layer {call.layer} of {name} does not attend to the whole prompt, so a second reading says nothing of it",
            todo,
        )
