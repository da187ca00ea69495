"""The output projection of a layer's attention: what each value adds to the layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.model.obstacles import language_model

TRANSPOSED = ("Conv1D",)  # classes whose weight is [inputs, outputs]; that of nn.Linear is [outputs, inputs]


@dataclass(frozen=True)
class OutputProjection:
    """The part of a projection that each query head's output goes through, ``[H, D, hidden]``."""

    weight: Tensor

    def of_heads(self, heads: Sequence[int]) -> OutputProjection:
        """Return the projection of some query heads."""
        return OutputProjection(self.weight[list(heads)])

    def norms(self, values: Tensor) -> Tensor:
        """Return the L1 norms ``[..., G, n]`` of projected values ``[..., G, n, D]``, each the mean over its group.

        Computed one query head at a time: the projected values are as large as the layer's output for each of them.
        """
        heads, kv_heads = len(self.weight), values.shape[-3]
        group, sums = heads // kv_heads, []
        for kv_head in range(kv_heads):
            own = values[..., kv_head, :, :]
            of = [
                (own @ self.weight[head].to(own.dtype)).abs().sum(-1)
                for head in range(kv_head * group, (kv_head + 1) * group)
            ]
            sums.append(torch.stack(of).mean(0))
        return torch.stack(sums, -2)


def output_projections(model: CausalModel, ids: Tensor) -> dict[int, OutputProjection]:
    """Return the output projection of each layer with attention, found on a few tokens ``[1, n]``.

    It is the linear module whose input is the output of the layer's heads, as it is.

    Raises
    ------
    ModelError
        If a layer has none: something lies between its heads and the projection, or its weights are quantised.
    """
    outputs: dict[int, Tensor] = {}
    found: dict[int, OutputProjection] = {}
    last: list[int] = []

    def attention(call: Call, kernel: Kernel) -> Tensor:
        outputs[call.layer] = output = kernel()
        last[:] = [call.layer]
        return output

    def look(module: nn.Module, args: tuple[object, ...]) -> None:
        if not last or last[0] in found or not args or not isinstance(args[0], Tensor):
            return
        heads = outputs[last[0]]  # [1, n, H, D]
        if args[0].shape == heads.flatten(2).shape and torch.equal(args[0], heads.flatten(2)):
            found[last[0]] = OutputProjection(_weight(module).view(*heads.shape[2:], -1))

    linear = [part for part in language_model(model).modules() if _is_plain(part)]
    hooks = [part.register_forward_pre_hook(look) for part in linear]
    try:
        with replace_attention(model, attention):
            model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(outputs.keys() - found.keys())
    if missing or not outputs:
        raise ModelError(
            f"layer {missing[0] if missing else 0} of {type(model).__name__} has no output projection that its heads "
            "go through as they are",
            "Use another model, or policies that do not need value_out_l1.",
        )
    return found


def _is_plain(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = type(module) is nn.Linear or type(module).__name__ in TRANSPOSED
    return named and isinstance(weight, Tensor) and weight.is_floating_point()


def _weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, ``[inputs, outputs]``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight if type(module).__name__ in TRANSPOSED else weight.T).detach()
