"""What a metric is: a number for every step and query head, from the full rows and the keys that were visible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.records import MetricRecord
from kvscope.core.registry import Registry
from kvscope.kernels import device as devices
from kvscope.metrics.coded import CodedRows
from kvscope.metrics.heaviest import heaviest, heaviest_by_rank, ranks
from kvscope.metrics.moments import Moments, moments, summed

T = TypeVar("T")
Direction = Literal["higher", "lower", "none"]
RECORDED = frozenset({"values"})  # signals that a trace may lack
SIGNALS = RECORDED | {"last_attended", "prompt_rank"}  # signals that a metric may need; the others follow from the rows
NOWHERE = 2**31 - 1  # rank of a key that has none: beyond any budget


@dataclass
class Rows:
    """A block of steps of one policy; quantities that several metrics use are computed once.

    Attributes
    ----------
    full : Tensor
        ``p``: full-cache attention, ``[L, H, b, n]`` for ``b`` steps and ``n`` keys, zero above the diagonal; in the
        closed loop each run has its own, ``[R, L, H, b, n]``, and so `missing`.
    visible : Tensor
        ``V``: bool ``[R, L, G, b, n]``.
    held : Tensor
        ``R``: bool ``[R, L, G, b, n]``.
    budget : Tensor
        int ``[R]``: ``B`` of each run.
    steps : Tensor
        int ``[b]``: positions of the queries.
    missing : Tensor or None
        ``[L, H, b]``: mass that a learned sink takes.
    signals : mapping of str to Tensor
        Those that the metric names in ``needs``, each with a leading ``R`` where the rows have one. ``values``:
        ``[L, G, n, D]``. ``last_attended``: int ``[L, H, b, n]``, the last step before the query at which the key's
        weight was above ``1/n`` in its row of ``n`` keys; its own position where there is none. ``prompt_rank``: int
        ``[L, H, b, n]``, rank of each key in the row of the last prompt query, 0 for the heaviest; `NOWHERE` for
        later keys, and for all of them at steps of the prompt.
    shared : dict
        Quantities that depend on the rows and budgets alone, computed once for all policies with these budgets: `once`.
    budgets : tuple of int
        The numbers of `budget`, so that a device need not be asked for them; by default they are read from it.
    coded : CodedRows or None
        Of a quantised cache: live rows and their output, which do not follow from the full rows.
    key_bytes : int
        Bytes of a key and its value in 16 bit.
    """

    full: Tensor
    visible: Tensor
    held: Tensor
    budget: Tensor
    steps: Tensor
    missing: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    shared: dict[tuple[str, tuple[int, ...]], object] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    coded: CodedRows | None = None
    key_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.budgets:
            self.budgets = tuple(self.budget.tolist())

    def once(self, name: str, make: Callable[[], T], *, any_budget: bool = False) -> T:
        """Return ``make()``, computed once for these rows and budgets; it must not depend on the policy's decisions.

        With `any_budget` it must not depend on the budgets either, and is computed once for all of them.
        """
        key = (name, () if any_budget else self.budgets)
        if key not in self.shared:
            self.shared[key] = make()
        return cast(T, self.shared[key])

    def heaviest(self, skip: int = 0) -> Tensor:
        """Return a mask of the ``B`` heaviest keys but the current and the first `skip`, bool ``[R, L, H, b, n]``."""
        return self.once(f"heaviest {skip}", lambda: self._heaviest(skip))

    @cached_property
    def seen(self) -> Tensor:
        """``V`` for query heads, bool ``[R, L, H, b, n]``."""
        return self._per_query_head(self.visible)

    @cached_property
    def all(self) -> Moments:
        """Sums over whole rows, ``[L, H, b]``, or ``[R, L, H, b]`` where each run has its own."""
        return self.once("all", lambda: summed(self.full, self.past.sum(-1).expand(self.full.shape[:-1])))

    @cached_property
    def kept(self) -> Moments:
        """Sums over the visible keys, ``[R, L, H, b]``."""
        return moments(self.full, self.visible, self.steps)

    @cached_property
    def best(self) -> Moments:
        """Sums over the ideal keys, ``[R, L, H, b]``."""
        return self.once("best", lambda: moments(self.full, self.ideal_mask, self.steps))

    @cached_property
    def both(self) -> Moments:
        """Sums over the ideal keys that are visible, ``[R, L, H, b]``."""
        return moments(self.full, self.visible, self.steps, self.ideal_mask)

    def norm(self, keys: Moments) -> Tensor:
        """Return the divisor of rows on some keys: their mass and that of a learned sink; 1 where both are 0."""
        total = keys.mass if self.missing is None else keys.mass + self.missing
        return torch.where(total > 0, total, 1)

    @cached_property
    def live(self) -> Tensor:
        """Live rows: full rows on ``V``, divided by their sum, ``[R, L, H, b, n]``; of a quantised cache its own."""
        if self.coded is not None:
            return self.coded.live
        return self._share(self.full * self.seen)

    @cached_property
    def whole(self) -> Tensor:
        """Full rows divided by their sum, as live rows are; recorded in 16 bit, they do not sum to one exactly."""
        return self.once("whole", lambda: self._share(self.full))

    @cached_property
    def current(self) -> Tensor:
        """Where a key is the query's own, bool ``[b, n]``."""
        return torch.arange(self.full.shape[-1], device=self.full.device) == self.steps[:, None]

    @cached_property
    def past(self) -> Tensor:
        """Keys that exist at each step, bool ``[b, n]``."""
        return torch.arange(self.full.shape[-1], device=self.full.device) <= self.steps[:, None]

    @cached_property
    def ideal_mask(self) -> Tensor:
        """The current key and the ``B`` heaviest others of each row, bool ``[R, L, H, b, n]`` (A2SF section 4.3)."""
        return self.once("ideal mask", lambda: self.heaviest() | self.current)

    def _heaviest(self, skip: int) -> Tensor:
        if devices.on_cpu(self.full.device):
            return heaviest(self.full, self.steps, self.budgets, skip)
        rank = self.once("ranks", lambda: ranks(self.full, self.steps).to(torch.int32), any_budget=True)
        return heaviest_by_rank(rank, self.steps, self.budget, skip)

    def _per_query_head(self, mask: Tensor) -> Tensor:
        return mask.repeat_interleave(self.full.shape[-3] // mask.shape[2], dim=2)

    def _share(self, kept: Tensor) -> Tensor:
        total = kept.sum(-1, keepdim=True)
        if self.missing is not None:
            total = total + self.missing[..., None]
        return kept / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Metric:
    """A named metric and its properties.

    Attributes
    ----------
    name : str
        Column name.
    direction : {"higher", "lower", "none"}
        Which way is better.
    range : tuple
        Smallest and largest value; None where there is no bound.
    when_nothing_evicted : float or None
        Its value when the policy evicted nothing; None where that depends on the sequence.
    unit : str
        Of its values; ``1`` for ratios.
    needs : frozenset of str
        What it reads from `Rows.signals`, of `SIGNALS`.
    compute : callable
        From `Rows` to ``[R, L, H, b]``; with `pooled`, to ``[R, L, H, b, 3]``.
    pooled : bool
        Whether the steps of a head are pooled before the value is formed: ``compute`` gives the terms
        ``x·y, x·x, y·y`` of a cosine over all steps, and every step of the head has that one cosine.
    summary : str
        First line of the function's docstring.
    """

    name: str
    direction: Direction
    range: tuple[float | None, float | None]
    when_nothing_evicted: float | None
    compute: Callable[[Rows], Tensor]
    pooled: bool = False
    summary: str = ""
    unit: str = "1"
    needs: frozenset[str] = frozenset()

    def declaration(self) -> MetricRecord:
        """Return the properties as they are written into results."""
        return MetricRecord(self.direction, self.range, self.when_nothing_evicted, self.unit, self.summary)


METRICS: Registry[Metric] = Registry("metric", "kvscope.metrics", "kvscope.metrics")


def metric_name(named: str | Metric | Callable[[Rows], Tensor]) -> str:
    """Return the name of a registered metric that is given by its name, itself or its function.

    Raises
    ------
    UsageError
        If it is not registered.
    """
    if isinstance(named, str):
        return METRICS.get(named).name
    for name, known in METRICS.items():
        if named is known or named is known.compute:
            return name
    raise UsageError(f"{named!r} is not a metric", "Put @kvscope.metric(...) above the function.")


def metric(
    name: str,
    *,
    direction: Direction,
    range: tuple[float | None, float | None],
    when_nothing_evicted: float | None,
    pooled: bool = False,
    unit: str = "1",
    needs: Iterable[str] = (),
) -> Callable[[Callable[[Rows], Tensor]], Callable[[Rows], Tensor]]:
    """Return a decorator that registers a function from `Rows` to values as a metric; see `Metric` for each property.

    Raises
    ------
    UsageError
        If it needs an unknown signal.
    """
    signals = frozenset(needs)
    if not signals <= SIGNALS:
        unknown = ", ".join(sorted(signals - SIGNALS))
        raise UsageError(
            f"metric {name} needs {unknown}, which no metric may use", f"Known: {', '.join(sorted(SIGNALS))}."
        )

    def register(function: Callable[[Rows], Tensor]) -> Callable[[Rows], Tensor]:
        summary = (function.__doc__ or "").strip().split("\n", 1)[0]
        made = Metric(name, direction, range, when_nothing_evicted, function, pooled, summary, unit, signals)
        METRICS.register(name, made, source=function)
        return function

    return register
