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
    """A block of steps of one policy: attention rows, and which keys were visible and held.

    What several metrics use, such as `live`, is computed at its first use and then stored. In the shapes, ``R`` is
    the number of runs (the budgets of the policy), ``L`` of layers, ``H`` of query heads, ``G`` of key/value heads,
    ``b`` of steps, ``n`` of keys and ``D`` the head size.

    Attributes
    ----------
    full : Tensor
        Full-cache attention, ``[L, H, b, n]``, zero for keys after the query. In the closed loop each run has its own
        rows, ``[R, L, H, b, n]``.
    visible : Tensor
        bool ``[R, L, G, b, n]``: the keys that the query can attend to (``V_t``).
    held : Tensor
        bool ``[R, L, G, b, n]``: the keys in the cache after the eviction of the step (``R_t``).
    budget : Tensor
        int ``[R]``: number of keys that a key/value head of each run may hold on average (``B``).
    steps : Tensor
        int ``[b]``: positions of the queries.
    missing : Tensor or None
        ``[L, H, b]``: attention mass that a learned sink takes; with a leading ``R`` where `full` has one.
    signals : mapping of str to Tensor
        The signals that the metric names in ``needs``, each with a leading ``R`` where `full` has one. ``values``:
        ``[L, G, n, D]``. ``last_attended``: int ``[L, H, b, n]``, the last step before the query at which the key's
        weight was above ``1/n`` in a row of ``n`` keys; if there is none, the position of the key. ``prompt_rank``: int
        ``[L, H, b, n]``, the rank of each key in the row of the last prompt query, 0 for the heaviest. Keys after the
        prompt have the rank `NOWHERE`, and at steps of the prompt all keys have it.
    shared : dict
        Quantities that depend on rows and budgets alone. `once` computes them once for all policies with these budgets.
    budgets : tuple of int
        The numbers of `budget`, so that they need not be copied from a device; by default they are read from it.
    coded : CodedRows or None
        For a quantised cache: its live rows and their output, which cannot be computed from the full rows.
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
        """Return a mask of the ``B`` heaviest keys, bool ``[R, L, H, b, n]``.

        The current key and the first `skip` keys are not among them.
        """
        return self.once(f"heaviest {skip}", lambda: self._heaviest(skip))

    @cached_property
    def seen(self) -> Tensor:
        """The visible keys of each query head, bool ``[R, L, H, b, n]``: `visible` of its key/value head."""
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
        """Live rows ``[R, L, H, b, n]``: full rows on the visible keys, divided by their sum.

        Those of a quantised cache are computed from its codes.
        """
        if self.coded is not None:
            return self.coded.live
        return self._share(self.full * self.seen)

    @cached_property
    def whole(self) -> Tensor:
        """Full rows divided by their sum, as live rows are; recorded in 16 bit, they do not sum to exactly one."""
        return self.once("whole", lambda: self._share(self.full))

    @cached_property
    def current(self) -> Tensor:
        """Where a key is the query's own, bool ``[b, n]``."""
        return torch.arange(self.full.shape[-1], device=self.full.device) == self.steps[:, None]

    @cached_property
    def past(self) -> Tensor:
        """Where a key exists at a step, bool ``[b, n]``."""
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
    """A metric: its name, its properties and the function that computes it.

    Attributes
    ----------
    name : str
        Column name.
    direction : {"higher", "lower", "none"}
        Which way is better.
    range : tuple
        Smallest and largest possible value; None where there is no bound.
    when_nothing_evicted : float or None
        Its value when every key is retained; None if that depends on the sequence.
    unit : str
        Unit of its values; ``1`` for ratios.
    needs : frozenset of str
        The signals that it reads from `Rows.signals`: ``values``, ``last_attended``, ``prompt_rank``.
    compute : callable
        Returns the values ``[R, L, H, b]`` of `Rows`; with `pooled`, ``[R, L, H, b, 3]``.
    pooled : bool
        Whether the value is one cosine over all steps of a head. Then ``compute`` returns the terms ``x·y``, ``x·x``
        and ``y·y`` of each step; they are summed over the steps, and every step of the head has the same value.
    summary : str
        First line of the function's docstring, which results and reports show.
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
        """Return the properties in the form in which results store them."""
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
    """Return a decorator that registers a function from `Rows` to values as a metric.

    The first line of the function's docstring is the description that results and reports show.

    Parameters
    ----------
    name : str
        Name of the metric in options and tables.
    direction, range, when_nothing_evicted, pooled, unit, needs
        Properties of the metric; `Metric` describes each.

    Raises
    ------
    UsageError
        If `needs` contains an unknown signal, or the name is taken.
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
