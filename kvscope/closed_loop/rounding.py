"""Whether a model with float64 weights computes a part in float32, as many norms, routers and softmaxes do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kvscope.closed_loop.forward import logits_of
from kvscope.core.model_types import CausalModel

STEP = 2.0**-27  # of an embedding, relative: an eighth of the last place of float32


def second_difference(model: CausalModel, ids: Tensor, keep: slice, beside: Mapping[str, Tensor]) -> float:
    """Return the largest second difference of the logits of ids ``[1, T]`` over two tiny steps of the embeddings.

    Logits that are computed in float64 change by as much in the second step as in the first, but for the curvature,
    which is of the order of the step squared. A value that passes through float32 changes by its last place or not at
    all.
    """

    def shifted(steps: int) -> Tensor:
        hook = model.get_input_embeddings().register_forward_hook(_shift(steps * STEP))
        try:
            return logits_of(model, ids, keep, beside)
        finally:
            hook.remove()

    none, one, two = (shifted(steps) for steps in (0, 1, 2))
    return float((two - 2 * one + none).abs().max())


def _shift(step: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """Return a hook that changes embeddings ``[1, T, hidden]`` by up to `step`, by another part in each place."""

    def shifted(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
        parts = torch.linspace(-1, 1, embedded.shape[-1], dtype=embedded.dtype, device=embedded.device)
        return embedded * (1 + step * parts)

    return shifted
