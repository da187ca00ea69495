"""What a query attends to where a cache is quantised: a live row that is not a part of the full one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CodedRows:
    """A block of steps of one policy with a quantised cache.

    Attributes
    ----------
    live : Tensor
        Live rows ``[R, L, H, b, n]``: each key in the precision that the cache has it in.
    output : Tensor
        Their output ``[R, L, H, b, D]``, with the values that the cache has.
    coded : Tensor
        bool ``[b]``: whether a key or value is read as a code at the step.
    size : Tensor
        Bytes of each key/value head's cache after the step's eviction, for its query heads, ``[R, L, H, b]``.
    """

    live: Tensor
    output: Tensor
    coded: Tensor
    size: Tensor

    def after(self, steps: int) -> CodedRows:
        """Return the block without its first steps."""
        return CodedRows(
            self.live[..., steps:, :], self.output[..., steps:, :], self.coded[steps:], self.size[..., steps:]
        )
