"""What training minimises: a task's loss, and the share of keys that stay beyond the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.gate_options import EvictionLoss
from kvscope.gates.module import LearnedGate
from kvscope.model.attention_hook import Call, Kernel


def straight_through(values: Tensor, tau: float) -> Tensor:
    """Return 1 where a gate is above `tau` and 0 elsewhere, with the gradient of the gate itself."""
    return (values > tau).to(values.dtype) + (values - values.detach())


def eviction_loss(flags: Sequence[Tensor], target: float, kind: EvictionLoss) -> Tensor:
    """Return how far layers are from keeping the share `target` of their keys, summed over layers.

    The paper's own formula subtracts the target, which then has no gradient (its reviewers say so); these are the three
    readings that have one. What is averaged are the decisions themselves, so that the target is the share that is
    really kept.

    Parameters
    ----------
    flags : sequence of Tensor
        Of each layer, ``[batch, G, keys]``, from `straight_through`.
    target : float
        Share of keys that should stay.
    kind : EvictionLoss
        ``max(0, mean - target)``, ``|mean - target|`` or ``(mean - target) ** 2``.
    """
    beyond = torch.stack([layer.mean() for layer in flags]) - target
    if kind == EvictionLoss.one_sided:
        return beyond.clamp(min=0).sum()
    return beyond.abs().sum() if kind == EvictionLoss.absolute else beyond.square().sum()


class Gated:
    """Answers attention calls as if evicted keys were gone, in a way that gradients pass.

    With streaming prefill a key that is shut is seen by its own query alone, in the whole text, as in the paper's
    prefill. With full prefill the keys of a prompt are gated, whose rows see everything; later rows see what is left of
    it, and every later key.

    Parameters
    ----------
    gate : LearnedGate
        What decides.
    prompt : int
        ``P``.
    prefill : {"full", "stream"}
        What is gated, and who sees it. A bidirectional gate makes sense with ``full`` alone.

    Attributes
    ----------
    flags : list of Tensor
        Decisions of every layer on the keys that are gated, ``[batch, G, keys]``.
    """

    def __init__(self, gate: LearnedGate, prompt: int, prefill: str) -> None:
        self._gate, self._prompt, self._full = gate, prompt, prefill == "full"
        self.flags: list[Tensor] = []

    def __call__(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the output of a layer, ``[batch, T, H, D]``."""
        assert call.hidden is not None, "attention modules are given their hidden states"
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
    """Return the output of attention whose weights on keys are multiplied by flags and divided by their new sum.

    A product, and not a sum of logits with the logarithm of the flag: so the gradient of a flag of zero is what the key
    would do if it came back, where a logarithm has none. A query always sees its own key.

    Parameters
    ----------
    call : Call
        Of the whole text.
    flags : Tensor
        ``[batch, G, T]``, 0 to 1.

    Returns
    -------
    Tensor
        ``[batch, T, H, D]``.
    """
    batch, groups, length = flags.shape
    rows = call.rows(0, length)  # [batch, H, T, T]
    value = torch.cat([call.value.to(rows.dtype), torch.ones_like(flags)[..., None]], -1)  # and a column for the sum
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
