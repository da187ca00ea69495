"""Losses of tokens with the full cache and under a run, and the difference of the two distributions."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 64 * 2**20  # limit for the distributions that are compared at a time


def compare_logits(full: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return a comparison of full-cache logits ``[1, S, V]`` with a run's ``[S, V]`` for target tokens ``[S]``.

    Each value is ``[S]``: ``nll_full`` and ``nll_policy`` are the losses and ``kl`` is KL(full ‖ policy), all in nats;
    ``top1_equal`` is whether both predict the same token, ``top1_correct`` whether the run predicts the target.
    """
    size = max(1, BLOCK_BYTES // (logits.shape[-1] * 8))
    parts = []
    for start in range(0, len(targets), size):
        block = slice(start, start + size)
        exact = torch.promote_types(logits.dtype, torch.float32)
        both = torch.log_softmax(torch.stack([full[0, block], logits[block]]).to(exact), -1)  # [2, b, V]
        losses = -both.gather(-1, targets[block, None].expand(2, -1, -1))[..., 0]
        share = torch.where(both[0].isneginf(), 0.0, both[0].exp() * (both[0] - both[1]))
        first = both.argmax(-1)  # [2, b]
        equal, correct = first[0] == first[1], first[1] == targets[block]
        parts.append((losses[0], losses[1], share.sum(-1).clamp(min=0), equal, correct))
    names = ("nll_full", "nll_policy", "kl", "top1_equal", "top1_correct")
    return {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
