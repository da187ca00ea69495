"""What a policy is: it looks at one step and scores keys. The engine does everything else.

Axes of every tensor, in this order: ``R`` runs (budgets of one policy), ``L`` layers, then heads (``H`` query heads,
``G`` key/value heads, or 1 where a whole layer decides as one), then ``n`` keys by position, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.registry import Registry
from kvscope.policies.recurrence import Recurrence

Scope = Literal["kv_head", "layer"]
Group = Literal["mean", "max", "sum"]
Phase = str  # "step", "prefill", "every:N" (N steps), "none"
Signal = Literal[
    "weights", "full_weights", "value_l1", "value_l2", "key_l2", "keys", "values", "queries", "mean_query", "schedule"
]


@dataclass(frozen=True)
class Protection:
    """Keys that stay whatever their score.

    Attributes
    ----------
    sinks : int
        The first keys of the sequence.
    recent : int
        The newest keys, the current one included.
    prompt : bool
        The whole prompt, which then counts in the budget.
    """

    sinks: int = 0
    recent: int = 0
    prompt: bool = False


@dataclass(frozen=True)
class Traits:
    """What the engine must know of a policy before the first step; see `Policy` for each."""

    needs: frozenset[str]
    scope: Scope
    phase: Phase
    bounded: bool
    reads: bool
    clairvoyant: bool
    allocate: str
    prefills: frozenset[str]
    published: bool


@dataclass
class Step:
    """What a policy may look at when query `t` has attended.

    Attributes
    ----------
    t : int
        Position of the query; keys ``0..t`` exist, so ``n = t + 1``.
    prompt, length : int
        ``P`` and ``T``.
    kv_heads : int
        ``G``.
    layers : Tensor
        int64 ``[L]``, the numbers of the layers.
    budget : Tensor
        int64 ``[R, L, S]``, the keys that each deciding head may hold.
    budgets : list of int
        ``B`` of each run, ``R`` numbers: what `budget` is on average.
    compresses : bool
        Whether the engine evicts at the end of this step.
    visible : Tensor
        bool ``[R, L, S, n]``, the keys the query saw (``V_t``); ``S`` is ``G``, or 1 where the layer decides as one.
    signals : dict of str to Tensor
        Those that the policy asked for in `needs`, each with a leading axis of ``R`` or 1: ``value_l1``, ``value_l2``,
        ``key_l2``: ``[., L, G, n]``; ``keys``, ``values``: ``[., L, G, n, D]`` as cached; ``queries``: ``[., L, H, D]``
        of the current query, ``mean_query``: ``[., L, D]``, its mean over query heads; ``full_weights``:
        ``[., L, H, n]``, the row before anything was evicted; ``schedule``: ``[R, L, S, n]``, the step after which each
        key leaves in the schedule that retains most; ``gate:FILE``: ``[., L, G, n]``, by how much the gate of each key
        is above its threshold.
    live : Tensor or None
        float ``[R, L, H, n]``, the live row: attention over the visible keys, summing to one. None unless needed.
    memory : dict of str to anything
        Whatever the policy wants to remember between the steps of one sequence, apart from its scores.
    draw : callable
        ``draw(seed)`` gives one uniform number in [0, 1) for key `t`, ``[L, S]``; it depends on the seed, the sequence,
        the layer, the head and the position alone.
    draw_row : callable
        ``draw_row(seed)`` gives one for every key at this step, ``[L, H, n]``, of each query head.
    """

    t: int
    prompt: int
    length: int
    kv_heads: int
    layers: Tensor
    budget: Tensor
    budgets: list[int]
    compresses: bool
    visible: Tensor
    signals: dict[str, Tensor]
    live: Tensor | None
    memory: dict[str, Any]
    draw: Callable[[int], Tensor]
    draw_row: Callable[[int], Tensor]

    def weights(self, group: Group = "mean") -> Tensor:
        """Return the live row per key/value head, ``[R, L, G, n]``; `group` makes its query heads one."""
        return self.grouped(self._live(), group)

    def layer_weights(self) -> Tensor:
        """Return the live row averaged over all query heads of the layer, ``[R, L, 1, n]``."""
        live = self._live()
        return compute_once_if_shared(live, lambda rows: rows.mean(2, keepdim=True, dtype=torch.float64).to(rows.dtype))

    def grouped(self, rows: Tensor, group: Group = "mean") -> Tensor:
        """Return rows of query heads ``[., L, H, n]`` as rows of key/value heads ``[., L, G, n]``."""

        def reduced(rows: Tensor) -> Tensor:
            grouped = rows.reshape(*rows.shape[:2], self.kv_heads, -1, rows.shape[-1])
            if group == "max":
                return grouped.amax(3)
            exact = torch.float64
            return (grouped.mean(3, dtype=exact) if group == "mean" else grouped.sum(3, dtype=exact)).to(rows.dtype)

        return compute_once_if_shared(rows, reduced)

    def _live(self) -> Tensor:
        assert self.live is not None, "the policy reads weights without naming them in `needs`"
        return self.live


def compute_once_if_shared(rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``make(rows)`` for rows ``[R, ...]``, made once where all runs share them: while nothing is evicted."""
    if len(rows) > 1 and rows.stride(0) == 0:
        return make(rows[:1]).expand(len(rows), *[-1] * (rows.ndim - 1))
    return make(rows)


@dataclass(frozen=True)
class Policy:
    """An eviction policy: parameters as fields, a score for every visible key at every step.

    A subclass is a frozen dataclass under ``@policy("name")``. It never evicts, rounds a budget or protects a key
    itself, and keeps nothing between sequences. The class attributes are what the bare name means; a policy whose
    parameters change one of them overrides `traits`.

    Attributes
    ----------
    name : str
        Set by the decorator.
    needs : frozenset of str
        Signals that it reads: ``weights``, ``full_weights``, ``value_l1``, ``value_l2``, ``key_l2``, ``keys``,
        ``values``, ``queries``, ``mean_query``, ``schedule``, ``gate:FILE``.
    scope : {"kv_head", "layer"}
        Whether every key/value head decides for itself, or the layer as one.
    phase : str
        When it evicts: at every ``step`` from the end of the prompt on, at the end of the prompt alone (``prefill``),
        then ``every:N`` steps, or never (``none``).
    bounded : bool
        Whether the engine holds it to a budget. One that is not evicts the keys that it scores ``-inf``.
    reads : bool
        Whether it is a sparse reader: it holds every key, and `read` says which of them a query sees.
    clairvoyant : bool
        Whether it is a bound that knows what a cache cannot know: rows to come, or the row of the query itself when it
        chooses what that reads.
    allocate : str
        How the budget of the whole model is shared out among layers and heads, unless the user says otherwise.
    prefills : frozenset of str
        Prefill semantics under which the rule makes sense.
    published : bool
        Whether it reproduces a published code with its quirks, rather than the plain rule.
    paper : str
        Where the rule comes from.
    proven : str
        What its decisions have been compared with, decision for decision.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    scope: ClassVar[Scope] = "kv_head"
    phase: ClassVar[Phase] = "step"
    bounded: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    clairvoyant: ClassVar[bool] = False
    allocate: ClassVar[str] = "uniform"
    prefills: ClassVar[frozenset[str]] = frozenset({"full", "stream"})
    published: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    proven: ClassVar[str] = ""

    @property
    def traits(self) -> Traits:
        """What the engine must know beforehand; override it with `with_traits` where parameters decide."""
        return _own_traits(self)

    def with_traits(self, **changes: Any) -> Traits:
        """Return the class's own traits with some changed: for an override of `traits`."""
        return replace(_own_traits(self), **changes)

    def protect(self, budget: int) -> Protection:
        """Return which keys stay whatever their score, for a budget in keys; by default none."""
        return Protection()

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        """Raise UsageError if it has no rule for these layers of a model of `n_layers`; by default it has for any."""

    def read(self, step: Step) -> Tensor:
        """Return which keys query `t` sees, bool ``[R, L, S, n]``: of a sparse reader alone, before its row is known.

        ``step.visible`` holds every key that exists, the current one included, and ``step.live`` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} is a reader and does not say what it reads: define read()")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        """Return the score of every key after this step, ``[R, L, S, n]``; the higher stays.

        Parameters
        ----------
        step : Step
            What the query saw.
        score : Tensor
            ``[R, L, S, n]``, what this method returned at the step before, and 0 for the key that has just arrived.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores keys: define observe()")

    def recurrence(self) -> Recurrence | None:
        """Return the line of arithmetic that `observe` is, where it is one: the engine may then compile it.

        What it says must be what the `observe` of the same class does, to the last bit.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults: ``a2sf(alpha=0.7)``."""
        own = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(own)})" if own else self.name


def _own_traits(policy: Policy) -> Traits:
    return Traits(**{item.name: getattr(policy, item.name) for item in fields(Traits)})


POLICIES: Registry[type[Policy]] = Registry("policy", "kvscope.policies", "kvscope.policies")
P = TypeVar("P", bound=Policy)


def policy(name: str) -> Callable[[type[P]], type[P]]:
    """Return a decorator that registers a policy class under `name`."""

    def register(cls: type[P]) -> type[P]:
        cls.name = name
        POLICIES.register(name, cls)
        return cls

    return register


def parameter(default: Any, help: str, search: Sequence[Any] = ()) -> Any:
    """Return a dataclass field with a default, a line of help, and the values that ``kvscope tune`` tries by itself."""
    return field(default=default, metadata={"help": help, "search": tuple(search)})


def at_least(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise UsageError unless ``low <= value`` (and ``value <= high``): for a policy's ``__post_init__``."""
    if not value >= low or (high is not None and not value <= high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={value} is out of range", f"{name} must be {bound}.")
