"""The loss of training: that of a task, plus a penalty on retaining more keys than the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.gate_options import EvictionLoss
from kvscope.gates.module import LearnedGate
from kvscope.model.attention_hook import Call, Kernel


def straight_through(values: Tensor, tau: float) -> Tensor:
    """Return 1 where a gate value is above `tau` and 0 elsewhere, with the gradient of the value (straight-through)."""
    return (values > tau).to(values.dtype) + (values - values.detach())


def eviction_loss(flags: Sequence[Tensor], target: float, kind: EvictionLoss) -> Tensor:
    """Return how far layers are from retaining the share `target` of their keys, summed over layers.

    The paper's formula subtracts the target as a constant, which has no effect on the gradient (its reviews point this
    out); these are the three readings where it has one. The mean is over decisions, not gate values, so that the target
    is the share of keys that are actually retained.

    Parameters
    ----------
    flags : sequence of Tensor
        Decisions of each layer, ``[batch, G, keys]``, from `straight_through`.
    target : float
        Share of keys that should be retained.
    kind : EvictionLoss
        ``max(0, mean - target)``, ``|mean - target|`` or ``(mean - target) ** 2``.
    """
    excess = torch.stack([layer.mean() for layer in flags]) - target
    if kind == EvictionLoss.one_sided:
        return excess.clamp(min=0).sum()
    return excess.abs().sum() if kind == EvictionLoss.absolute else excess.square().sum()


class Gated:
    """Differentiable attention without the keys that a gate evicts, for `replace_attention`.

    With streaming prefill every key is gated, and an evicted key is visible only to its own query, as in the paper's
    prefill. With full prefill only the keys of the prompt are gated: queries of the prompt see all keys up to their
    own, later queries see the retained keys of the prompt and every later key.

    Parameters
    ----------
    gate : LearnedGate
        Gate that decides which keys are evicted.
    prompt : int
        ``P``.
    prefill : {"full", "stream"}
        Which keys are gated. Use a bidirectional gate with ``full`` only.

    Attributes
    ----------
    flags : list of Tensor
        Decisions of each layer on the gated keys, ``[batch, G, keys]``.
    """

    def __init__(self, gate: LearnedGate, prompt: int, prefill: str) -> None:
        self._gate, self._prompt, self._full = gate, prompt, prefill == "full"
        self.flags: list[Tensor] = []

    def __call__(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the output of a layer, ``[batch, T, H, D]``."""
        assert call.hidden is not None, "attention modules get hidden states"
        length = call.query.shape[2]
        values = self._gate.values(call.layer, call.hidden.to(call.exact), self._prompt)
        flags = straight_through(values, self._gate.facts.tau)
        gated = min(self._prompt, length) if self._full else length
        self.flags.append(flags[..., :gated])
        place = torch.arange(length, device=flags.device)
        output = attended(call, torch.where(place < gated, flags, 1.0)).to(call.query.dtype)
        if gated == length:
            return output
        return torch.where((place < gated)[:, None, None], kernel(), output)


def attended(call: Call, flags: Tensor) -> Tensor:
    """Return the output of attention whose weights are multiplied by the flags of their keys and renormalised.

    Adding the logarithm of the flag to the logits would give the same output but no gradient where a flag is zero; with
    the product that gradient is the effect of retaining the key. A query always sees its own key.

    Parameters
    ----------
    call : Call
        Attention call of the whole text.
    flags : Tensor
        One flag per key, 0 to 1, ``[batch, G, T]``.

    Returns
    -------
    Tensor
        ``[batch, T, H, D]``.
    """
    batch, groups, length = flags.shape
    rows = call.rows(0, length)  # [batch, H, T, T]
    value = torch.cat([call.value.to(rows.dtype), torch.ones_like(flags)[..., None]], -1)  # last column: sum of weights
    kept = rows.view(batch, groups, -1, length) @ (value * flags[..., None])  # [batch, G, Q * T, D + 1]
    kept = kept.view(batch, groups, -1, length, value.shape[-1])
    own = rows.diagonal(dim1=-2, dim2=-1).view(batch, groups, -1, length)  # [batch, G, Q, T]
    kept = kept + (own * (1 - flags[:, :, None]))[..., None] * value[:, :, None]
    total = kept[..., -1:]
    if call.sinks is not None:
        total = total + (1 - rows.sum(-1).view(batch, groups, -1, length, 1)).clamp(min=0)
    output = kept[..., :-1] / total.clamp(min=torch.finfo(rows.dtype).tiny)
    return output.flatten(1, 2).transpose(1, 2)


def language_loss(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean negative log-likelihood of tokens, nats, from ``[batch, T, V]`` and ``[batch, T]``."""
    predicted = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()
