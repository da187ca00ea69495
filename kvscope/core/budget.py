"""How many keys a cache may hold: the only place that parses and rounds budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill

NO_BUDGET = "no budget"  # in names of runs: of the full cache, and of policies that choose the size of their cache
_TODO = "Write a whole number of keys (256) or a share with a percent sign (20%)."


@dataclass(frozen=True)
class Budget:
    """A number of keys per key/value head, or a share of the sequence; `Budget.parse` makes one from ``"20%"``.

    Parameters
    ----------
    amount : Decimal
        Number of keys, or percentage of the sequence.
    is_share : bool
        Whether `amount` is a percentage.

    Example
    -------
    >>> Budget.parse("20%").keys(prompt=91, length=107, prefill=Prefill.full)
    19
    """

    amount: Decimal
    is_share: bool

    @classmethod
    def parse(cls, text: str | float | Budget) -> Budget:
        """Return the budget that a text or number stands for: ``256`` keys, or ``20%`` of the sequence.

        A float between 0 and 1 is a share: ``0.2`` is ``20%``. A whole float is a number of keys: 1.0 means the same
        as 1.

        Raises
        ------
        UsageError
            If `text` is neither a whole positive number nor a percentage above 0 and up to 100.
        """
        if isinstance(text, Budget):
            return text
        if isinstance(text, float) and 0 < text < 1:
            return cls(Decimal(str(text)) * 100, is_share=True)
        if isinstance(text, float) and text.is_integer():
            text = int(text)
        if isinstance(text, bool) or not isinstance(text, (str, int)):
            raise UsageError(f"budget {text!r} is neither keys nor a share", _TODO)
        raw = str(text).strip()
        is_share = raw.endswith("%")
        digits = raw[:-1].strip() if is_share else raw
        try:
            amount = Decimal(digits)
        except InvalidOperation:
            raise UsageError(f"budget {raw!r} is not a number", _TODO) from None
        if not amount.is_finite() or amount <= 0:
            raise UsageError(f"budget {raw!r} is not above zero", _TODO)
        if is_share and amount > 100:
            raise UsageError(f"budget {raw!r} is more than the whole sequence", _TODO)
        if not is_share and not digits.isdecimal():
            raise UsageError(f"budget {raw!r} could be keys or a share", _TODO)
        return cls(amount, is_share)

    def keys(self, *, prompt: int, length: int, prefill: Prefill) -> int:
        """Return the budget in keys per key/value head, at least 1.

        A share is ``ceil(share * P)`` with full prefill and ``ceil(share * T)`` with streaming prefill, where ``P`` is
        the number of tokens of the prompt (`prompt`) and ``T`` that of the sequence (`length`).
        """
        if not self.is_share:
            return int(self.amount)
        base = prompt if prefill == "full" else length
        return max(1, int((self.amount * base / 100).to_integral_value(ROUND_CEILING)))

    def __str__(self) -> str:
        plain = format(self.amount.normalize(), "f")
        return f"{plain}%" if self.is_share else plain


def parse_budgets(text: str | float | Budget | Sequence[str | float | Budget]) -> list[Budget]:
    """Return the budgets of a comma-separated text or a sequence, in order and without repeats.

    Raises
    ------
    UsageError
        If one of them is not a budget, or none is given.
    """
    parts: Sequence[str | float | Budget]
    if isinstance(text, str):
        parts = [part for part in text.split(",") if part.strip()]
    elif isinstance(text, (int, float, Budget)):
        parts = [text]
    else:
        parts = text
    budgets = list(dict.fromkeys(Budget.parse(part) for part in parts))
    if not budgets:
        raise UsageError(f"no budget in {text!r}", _TODO)
    return budgets
