"""What a press retains of a prompt: it runs inside the model, as kvpress runs it, and the cache it leaves is read.

The press is put into the model by its own context manager, and one pass reads the prompt into a full cache. The hook of
the press then cuts the cache of each layer after that layer has attended, so that no layer sees what another evicts:
the pass is that of the full cache. Two hooks of this module are called before and after that of the press. The first
copies the keys and values, the second looks for each of those that are left among them; or reads which keys the press
has marked to be hidden while tokens are generated, as presses do that give heads different numbers of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kvscope.core.errors import KvscopeError, UsageError
from kvscope.core.memory import is_out_of_memory
from kvscope.core.model_types import CausalModel, KeyValueCache
from kvscope.model.foreign_hooks import attention_kernel, attention_modules, modules_as_before
from kvscope.model.image_check import forget_positions
from kvscope.model.short_cache import full_cache
from kvscope.policies.press import PREFIX, PressCall
from kvscope.presses.build import Built, build, reads_rows, said

SEED = 0  # of the random draws of a press that has no seed of its own, at the start of every prompt
MASKED = "masked_key_indices"  # attribute of an attention module: batch, head and position of the keys to hide


class Chosen(NamedTuple):
    """What a press retains of one prompt.

    Attributes
    ----------
    kept : dict of int to Tensor
        For each layer bool ``[G, P]``.
    logits : Tensor
        ``[V]`` after the last token of the prompt: those of the full cache.
    """

    kept: dict[int, Tensor]
    logits: Tensor


class Hooked(Protocol):
    """A hook of a module that can be removed."""

    def remove(self) -> None:
        """Remove the hook."""


def ratio_of(keys: int, prompt: int) -> float:
    """Return the compression ratio at which kvpress retains so many keys of a prompt, ``int(prompt * (1 - ratio))``.

    It is the largest number up to ``1 - keys / prompt`` whose product, rounded as kvpress rounds it, gives `keys`:
    ``1 - 20 / 100`` itself gives 19.
    """
    if keys >= prompt:
        return 0.0
    ratio = 1 - keys / prompt
    while int(prompt * (1 - ratio)) < keys:
        ratio = math.nextafter(ratio, 0.0)
    return ratio


@torch.no_grad()
def chosen_by(model: CausalModel, ids: Tensor, call: PressCall, budget: int | None) -> Chosen:
    """Return which keys of a prompt a press retains, and the logits at its end.

    Parameters
    ----------
    model : transformers model
        In eval mode; it is as before on return, as are transformers and the state of random numbers.
    ids : Tensor
        int64 ``[P]``.
    call : PressCall
        The press.
    budget : int or None
        Keys per key/value head: the press gets the ratio that retains as many. None if its arguments give its ratio.

    Raises
    ------
    UsageError
        If the press cannot be built or followed, or refuses the prompt.
    ModelError
        If the model has no modules that a press can be put into.
    """
    press = build(call)
    if budget is not None:
        press.compression_ratio = ratio_of(budget, len(ids))
    reading = _Reading(call, len(ids))
    kernel = "eager" if reads_rows(call) else "sdpa"
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(modules_as_before(model))
        stack.enter_context(attention_kernel(model, kernel))
        torch.manual_seed(SEED)
        forget_positions(model)
        logits = reading.run(model, ids, press)
    return Chosen(reading.kept, logits)


class _Reading:
    """The hooks around those of a press, and what they find."""

    def __init__(self, call: PressCall, prompt: int) -> None:
        self.call, self.prompt = call, prompt
        self.kept: dict[int, Tensor] = {}
        self._full: tuple[Tensor, Tensor] | None = None

    def run(self, model: CausalModel, ids: Tensor, press: Built) -> Tensor:
        """Run the model over the prompt with the press in it, and return the logits ``[V]`` of the last token."""
        modules, cache, hooks = attention_modules(model), full_cache(model), list[Hooked]()
        ids = ids.to(model.get_input_embeddings().weight.device)[None]
        try:
            for module in modules.values():
                setattr(module, MASKED, None)
                hooks.append(module.register_forward_hook(self._before, with_kwargs=True))
            with _explained(self.call, self.prompt), press(model):  # type: ignore[attr-defined]  # a context manager
                hooks += [module.register_forward_hook(self._after, with_kwargs=True) for module in modules.values()]
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        logits: Tensor = output.logits[0, -1]
        return logits

    def _before(self, module: nn.Module, args: object, kwargs: dict[str, KeyValueCache], output: object) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        self._full = (layer.keys.clone(), layer.values.clone())  # copies: the press may write into those of the cache

    def _after(self, module: nn.Module, args: object, kwargs: dict[str, KeyValueCache], output: object) -> None:
        assert self._full is not None, "called after _before of the same module"
        number = int(module.layer_idx)  # type: ignore[arg-type]
        layer, masked = kwargs["past_key_values"].layers[number], getattr(module, MASKED)
        if self._full[0].shape[2] != self.prompt:
            self.kept[number] = self._in_window(layer.keys)
            return
        heads = zip(*(_rows(*pair) for pair in (self._full, (layer.keys, layer.values))), strict=True)
        found = [_positions(full, left) for full, left in heads]
        if any(positions is None for positions in found):
            raise UsageError(
                f"{PREFIX}{self.call} cannot be followed: it changes the keys or values that it retains",
                "Use another press; docs/kvpress.md lists those that can be followed.",
            )
        kept = torch.zeros(len(found), self.prompt, dtype=torch.bool)
        for head, positions in enumerate(found):
            kept[head, positions] = True
        if masked is not None:
            _, of_heads, hidden = (torch.as_tensor(each).cpu() for each in masked)
            kept[of_heads, hidden] = False
            setattr(module, MASKED, None)
        self.kept[number] = kept
        self._full = None

    def _in_window(self, left: Tensor) -> Tensor:
        """Return that a layer with a sliding window retains every key, as far as its window does."""
        assert self._full is not None, "called by _after"
        if left.shape != self._full[0].shape:
            raise UsageError(
                f"{PREFIX}{self.call} cannot be followed: it cuts the cache of a layer with a sliding window",
                "Use another model, or policies of kvscope.",
            )
        return torch.ones(left.shape[1], self.prompt, dtype=torch.bool)


@contextmanager
def _explained(call: PressCall, prompt: int) -> Iterator[None]:
    """Turn an error of a press, or of the model with it, into one that names the press."""
    try:
        yield
    except KvscopeError:
        raise
    except Exception as error:  # an assertion of kvpress, whatever its class
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{PREFIX}{call} fails on a prompt of {prompt} tokens: {said(error)}",
            "Change its parameters or the budget, or use a longer prompt.",
        ) from error


def _rows(keys: Tensor, values: Tensor) -> list[list[bytes]]:
    """Return for each head what the cache has of each key, as bytes, from keys and values ``[1, G, n, D]``."""
    both = torch.cat([keys[0], values[0]], -1).contiguous().cpu()
    raw = both.view(torch.uint8).numpy()  # [G, n, bytes]
    return [[row.tobytes() for row in head] for head in raw]


def _positions(full: list[bytes], left: list[bytes]) -> list[int] | None:
    """Return where each of the keys that are left was, in order; None if one was not there.

    Of equal keys with equal values the first is meant: no attention differs.
    """
    places: dict[bytes, list[int]] = {}
    for position in reversed(range(len(full))):
        places.setdefault(full[position], []).append(position)
    found = [places[row].pop() if places.get(row) else None for row in left]
    return None if None in found else [place for place in found if place is not None]
