"""Whether a model in float64 multiplies matrices in a lower precision, as some routers of experts do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# Products, and the place of their left factor [..., rows, entries] among the arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1}


class LowerProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the matrix products of a model while it is active.

    A product adds up in an order that depends on how many rows it is given, so in float32 a pass over a text and
    decoding differ by its rounding. A product over one entry adds nothing: rotary positions are made so.

    Attributes
    ----------
    found : bool
        Whether a product over more than one entry was below float64.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Compute as without the mode, and note the product."""
        place = PRODUCTS.get(func._schema.name.removeprefix("aten::"))
        if place is not None:
            left = args[place]
            assert isinstance(left, Tensor)
            self.found |= left.dtype is not torch.float64 and left.shape[-1] > 1
        return func(*args, **(kwargs or {}))
