"""Observe the attention calls of a model, or replace their output.

transformers looks up the attention function of a model by name in a registry. Both context managers register a function
under a new name and select it in the model's configuration. `observe_attention` passes each call to an observer and
then to the original kernel, so the output does not change. `replace_attention` lets a function return the output. The
kernel's mask function is registered under the same name: without it transformers builds no mask, and the attention
would not be causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kvscope.core.errors import ModelError
from kvscope.core.model_types import ModelConfig
from kvscope.model.attention_kernels import function_of, is_causal, layer_and_chunk
from kvscope.model.obstacles import language_model, require_registry

PREFIX = "kvscope-watch-"
KERNELS = ("sdpa", "eager")


@dataclass
class Call:
    """One call of one layer's attention.

    Attributes
    ----------
    layer : int
        Number of the layer.
    query : Tensor
        ``[batch, H, q, D]``, after rotary embedding.
    key, value : Tensor
        ``[batch, G, k, D]``, as the cache holds them; a sliding-window layer's cache holds the newest keys only.
    mask : Tensor or None
        Mask given to the kernel: bool (True is visible) or additive, ``[batch, 1 or H, q, >= k]``; None means causal.
    scaling : float
        Factor of the logits.
    softcap : float or None
        Cap of the logits.
    sinks : Tensor or None
        Learned sink logits ``[H]``, which take part in the softmax but belong to no key.
    sliding_window : int or None
        Largest number of keys that a query sees, including its own.
    hidden : Tensor or None
        ``[batch, q, hidden]``, the input of the layer's attention module, where it is observed.
    chunk : int or None
        Size of the chunks in which the layer attends: a query sees the earlier keys of its own chunk.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    sliding_window: int | None = None
    hidden: Tensor | None = None
    chunk: int | None = None

    @cached_property
    def exact(self) -> torch.dtype:
        """Dtype in which rows are recomputed: float32, or the model's dtype if that is more precise."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @cached_property
    def key32(self) -> Tensor:
        """Keys in the dtype `exact`, converted once for all blocks of queries."""
        return self.key.to(self.exact)

    def rows(self, start: int, stop: int, keys: int | None = None) -> Tensor:
        """Return the attention weights of queries `start` to `stop` - 1 of this call, ``[batch, H, stop - start, k]``.

        The weights are recomputed from queries and keys in float32 or better, in the order of the model's eager code:
        scale, cap, mask, softmax with the learned sink, whose column is then dropped.

        Parameters
        ----------
        start, stop : int
            Range of queries.
        keys : int, optional
            Compute only the first `keys` columns; these queries must not see any later key.
        """
        return self.softmax(self.logits(start, stop, keys))

    def rows_and_log_sums(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the same rows, and for each row ln(sum(exp(logit))) with the learned sink, ``[batch, H, b]``."""
        logits = self.logits(start, stop)
        log_sums = logits.logsumexp(-1)
        if self.sinks is not None:
            log_sums = torch.logaddexp(log_sums, self.sinks.to(logits.dtype)[None, :, None])
        return self.softmax(logits), log_sums

    def logits(self, start: int, stop: int, keys: int | None = None) -> Tensor:
        """Return the masked logits of the same queries and keys, scaled and capped, as `rows` takes them."""
        batch, heads, _, size = self.query.shape
        groups, keys = self.key.shape[1], self.key.shape[2] if keys is None else keys
        query = self.query[:, :, start:stop].to(self.exact).reshape(batch, groups, -1, size)  # [batch, G, Q * q, D]
        logits = (query @ self.key32[:, :, :keys].transpose(2, 3)).mul_(self.scaling)
        logits = logits.view(batch, heads, stop - start, keys)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_() * self.softcap  # not in place: tanh's gradient needs its output
        return self._masked(logits, start, stop)

    def softmax(self, logits: Tensor) -> Tensor:
        """Return the rows of logits ``[batch, H, b, n]``, without the learned sink's column."""
        if self.sinks is None:
            return torch.softmax(logits, -1)
        sink = self.sinks.to(logits.dtype).view(1, -1, 1, 1).expand(len(logits), -1, logits.shape[2], 1)
        return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]

    def _masked(self, logits: Tensor, start: int, stop: int) -> Tensor:
        keys = logits.shape[-1]
        if self.mask is not None:
            mask = self.mask[:, :, start:stop, :keys]
            if mask.shape[-1] != keys:
                raise ModelError(
                    f"layer {self.layer} attends to {keys} keys with a mask for {mask.shape[-1]}",
                    "Trace another model: this one does not decode with a cache as it reads a prompt.",
                )
            if mask.dtype == torch.bool:
                return logits.masked_fill_(~mask, -torch.inf)
            return logits.add_(mask)
        if self.query.shape[2] == 1 and self.sliding_window is None:
            return logits
        earlier = self.key.shape[2] - self.query.shape[2]  # keys cached before the first query of the call
        position = torch.arange(start, stop, device=logits.device)[:, None] + earlier
        first = 0 if self.sliding_window is not None else start + earlier  # all queries see the keys before it
        key = torch.arange(first, keys, device=logits.device)
        hidden = key > position
        if self.sliding_window is not None:
            hidden |= key <= position - self.sliding_window
        logits[..., first:].masked_fill_(hidden, -torch.inf)
        return logits


Observer = Callable[[Call], None]
Kernel = Callable[..., Tensor]  # kernel() computes the whole batch, kernel(n) the first n entries of it
AttentionFunction = Callable[[Call, Kernel], Tensor]


@contextmanager
def observe_attention(model: nn.Module, observer: Observer, *, inputs: bool = True) -> Iterator[None]:
    """Pass every attention call of the model to `observer`; the output of the model does not change.

    Without `inputs`, calls have no `hidden`, and each takes less time.

    Raises
    ------
    ModelError
        If the model's attention does not use the registry, or its kernel is not one of `KERNELS`.
    """

    def attention(call: Call, kernel: Kernel) -> Tensor:
        observer(call)
        return kernel()

    with replace_attention(model, attention, inputs=inputs):
        yield


@contextmanager
def replace_attention(model: nn.Module, attention: AttentionFunction, *, inputs: bool = True) -> Iterator[None]:
    """Let ``attention(call, kernel)`` compute the output ``[batch, q, H, D]`` of every attention call of the model.

    ``kernel()`` returns the output of the original kernel, ``kernel(n)`` that of the first ``n`` entries of the batch.
    On exit, also after an error, the model and the registry are as before. `inputs` as in `observe_attention`.

    Raises
    ------
    ModelError
        As `observe_attention`.
    """
    require_registry(model)
    language = language_model(model)
    modules = list(language.modules())  # once: a walk over a large model takes milliseconds
    configs = _configs(modules)
    before = [(config, config._attn_implementation) for config in configs]
    kernels = {name for _, name in before}
    unknown = kernels - set(KERNELS)
    if unknown:
        raise ModelError(
            f"the attention kernel {sorted(unknown)[0]!r} cannot be observed",
            f"Load the model with one of: {', '.join(KERNELS)}.",
        )
    inside = {id(module) for module in modules}
    read: dict[int, Tensor] = {}  # id of an attention module -> its input, until its kernel is called
    hooked = _numbered(modules) if inputs else []
    hooks = [module.register_forward_pre_hook(_store_input(read), with_kwargs=True) for module in hooked]
    try:
        for kernel in kernels:
            AttentionInterface.register(PREFIX + kernel, _interface(kernel, attention, read, inside))
            AttentionMaskInterface.register(PREFIX + kernel, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
        for config, kernel in before:
            config._attn_implementation_internal = PREFIX + kernel
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for config, kernel in before:
            config._attn_implementation_internal = kernel
        for kernel in kernels:
            # The registries have no method to unregister a name.
            AttentionInterface._global_mapping.pop(PREFIX + kernel, None)
            AttentionMaskInterface._global_mapping.pop(PREFIX + kernel, None)


def _configs(modules: Sequence[nn.Module]) -> list[ModelConfig]:
    found: dict[int, ModelConfig] = {}
    for module in modules:
        config = getattr(module, "config", None)
        if config is not None and id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def _numbered(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the innermost modules that have a layer number; the attention modules are among them."""
    numbered = [module for module in modules if hasattr(module, "layer_idx")]
    known = set(map(id, numbered))
    return [module for module in numbered if sum(id(part) in known for part in module.modules()) == 1]


def _store_input(inputs: dict[int, Tensor]) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    """Return a forward pre-hook that stores the input of a module in `inputs`."""

    def store(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor):
            inputs[id(module)] = hidden

    return store


def _interface(
    kernel: str, attention: AttentionFunction, inputs: dict[int, Tensor], inside: set[int]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function to register in place of the kernel called `kernel`.

    Modules whose id is not in `inside` belong to an image encoder with the configuration of the language model.
    """
    places: dict[int, tuple[int, int | None]] = {}  # id of a module -> its layer and chunk; a configuration is slow

    def replaced(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if id(module) not in inside:
            return function_of(kernel, module)(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("position_bias") is not None:
            raise ModelError(
                f"{type(module).__name__} adds a position bias, which cannot be recorded",
                "Trace a model without a position bias.",
            )
        if attention_mask is None and query.shape[2] > 1 and not is_causal(module, kwargs):
            raise ModelError(
                f"{type(module).__name__} looks at later tokens, as an encoder or a prefix model does",
                "Trace a decoder; for a decoder that was made from an encoder, is_decoder is true in its config.json.",
            )
        sinks = kwargs.get("s_aux")
        scaling = kwargs.get("scaling")
        if id(module) not in places:
            places[id(module)] = layer_and_chunk(module)
        layer, chunk = places[id(module)]
        call = Call(
            layer=layer,
            query=query,
            key=key,
            value=value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=sinks,
            sliding_window=kwargs.get("sliding_window"),
            hidden=inputs.pop(id(module), None),
            chunk=chunk,
        )

        def original(rows: int | None = None) -> Tensor:
            function = function_of(kernel, module)
            if rows is None:
                return function(module, query, key, value, attention_mask, **kwargs)[0]
            mask = attention_mask if attention_mask is None or len(attention_mask) == 1 else attention_mask[:rows]
            return function(module, query[:rows], key[:rows], value[:rows], mask, **kwargs)[0]

        return attention(call, original), None

    return replaced
