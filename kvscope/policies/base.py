"""What a policy is: it looks at one step and scores keys. The engine does everything else.

Axes of every tensor, in this order: ``R`` runs (budgets of one policy), ``L`` layers, then heads (``H`` query heads,
``G`` key/value heads, or 1 where a whole layer decides as one), then ``n`` keys by position, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from kvscope.errors import UsageError
from kvscope.registry import Registry

Scope = Literal["kv_head", "layer"]
Group = Literal["mean", "max", "sum"]
Phase = Literal["step", "prefill", "none"]
Signal = Literal["weights", "value_l1", "value_l2", "key_l2"]


@dataclass(frozen=True)
class Protection:
    """Keys that stay whatever their score: the first `sinks`, the last `recent` (the current one included)."""

    sinks: int = 0
    recent: int = 0


@dataclass
class Step:
    """What a policy may look at when query `t` has attended.

    Attributes
    ----------
    t : int
        Position of the query; keys ``0..t`` exist, so ``n = t + 1``.
    kv_heads : int
        ``G``.
    visible : Tensor
        bool ``[R, L, S, n]``, the keys the query saw (``V_t``); ``S`` is ``G``, or 1 where the layer decides as one.
    signals : dict of str to Tensor
        ``value_l1``, ``value_l2``, ``key_l2``: float ``[L, G, n]``; those that the policy asked for in `needs`.
    live : Tensor or None
        float ``[R, L, H, n]``, the live row: attention over the visible keys, summing to one. None unless needed.
    memory : dict of str to Tensor
        Whatever the policy wants to remember between the steps of one sequence, apart from its scores.
    draw : callable
        ``draw(seed)`` gives one uniform number in [0, 1) for key `t`, ``[L, S]``; it depends on the seed, the sequence,
        the layer, the head and the position alone.
    """

    t: int
    kv_heads: int
    visible: Tensor
    signals: dict[str, Tensor]
    live: Tensor | None
    memory: dict[str, Tensor]
    draw: Callable[[int], Tensor]

    def weights(self, group: Group = "mean") -> Tensor:
        """Return the live row per key/value head, ``[R, L, G, n]``; `group` makes its query heads one."""
        assert self.live is not None, "the policy reads weights without naming them in `needs`"
        runs, layers, _, n = self.live.shape
        grouped = self.live.view(runs, layers, self.kv_heads, -1, n)
        if group == "mean":
            return grouped.mean(3)
        return grouped.sum(3) if group == "sum" else grouped.amax(3)

    def layer_weights(self) -> Tensor:
        """Return the live row averaged over all query heads of the layer, ``[R, L, 1, n]``."""
        assert self.live is not None, "the policy reads weights without naming them in `needs`"
        return self.live.mean(2, keepdim=True)


@dataclass(frozen=True)
class Policy:
    """An eviction policy: parameters as fields, a score for every visible key at every step.

    A subclass is a frozen dataclass under ``@policy("name")``. It never evicts, rounds a budget or protects a key
    itself, and keeps nothing between sequences.

    Attributes
    ----------
    name : str
        Set by the decorator.
    needs : frozenset of str
        Signals that it reads: ``weights``, ``value_l1``, ``value_l2``, ``key_l2``.
    scope : {"kv_head", "layer"}
        Whether every key/value head decides for itself, or the layer as one.
    phase : {"step", "prefill", "none"}
        When it evicts.
    bounded : bool
        Whether the engine holds it to a budget.
    paper : str
        Where the rule comes from.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    scope: ClassVar[Scope] = "kv_head"
    phase: ClassVar[Phase] = "step"
    bounded: ClassVar[bool] = True
    paper: ClassVar[str] = ""

    def protect(self, budget: int) -> Protection:
        """Return which keys stay whatever their score, for a budget in keys; by default none."""
        return Protection()

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

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by name, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults: ``a2sf(alpha=0.7)``."""
        own = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(own)})" if own else self.name


POLICIES: Registry[type[Policy]] = Registry("policy", "kvscope.policies")
P = TypeVar("P", bound=Policy)


def policy(name: str) -> Callable[[type[P]], type[P]]:
    """Return a decorator that registers a policy class under `name`."""

    def register(cls: type[P]) -> type[P]:
        cls.name = name
        POLICIES.register(name, cls)
        return cls

    return register


def parameter(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and a line of help for ``kvscope policies``."""
    return field(default=default, metadata={"help": help})


def at_least(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise UsageError unless ``low <= value`` (and ``value <= high``): for a policy's ``__post_init__``."""
    if not value >= low or (high is not None and not value <= high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={value} is out of range", f"{name} must be {bound}.")
