"""The base of policies: a policy observes one step and scores keys. The engine does everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.registry import Registry
from kvscope.policies.citation import Citation
from kvscope.policies.recurrence import Recurrence
from kvscope.policies.step import GroupReduction, Step, compute_once_if_shared

__all__ = [
    "POLICIES",
    "VARIANTS",
    "Citation",
    "GroupReduction",
    "Phase",
    "Policy",
    "Protection",
    "Recurrence",
    "Scope",
    "Step",
    "Traits",
    "at_least",
    "compute_once_if_shared",
    "parameter",
    "policy",
    "recurrence_of",
    "variant",
    "variant_parameter",
]

Scope = Literal["kv_head", "layer"]
Phase = str  # "step", "prefill", "every:N" (N steps), "none"


@dataclass(frozen=True)
class Protection:
    """Keys that are never evicted, whatever their score.

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
    """The properties of a policy that the engine needs before the first step; see `Policy` for each."""

    needs: frozenset[str]
    scope: Scope
    phase: Phase
    bounded: bool
    reads: bool
    clairvoyant: bool
    allocate: str
    prefills: frozenset[str]
    published: bool
    marks: bool

    @property
    def counted(self) -> bool:
        """Whether the budget is the number of keys that each head retains, so that the engine can count them."""
        return self.bounded and not self.marks


@dataclass(frozen=True)
class Policy:
    """An eviction policy: its parameters are fields, and it gives every visible key a score at every step.

    A subclass is a frozen dataclass under ``@policy("name")``, or under ``@variant("name", "variant")`` where a
    published code differs from the plain rule. It never evicts, rounds a budget or protects a key itself, and keeps
    nothing between sequences. The class attributes hold for the default parameters; a policy whose parameters change
    one of them overrides `traits`.

    Attributes
    ----------
    name : str
        Name on the command line; set by the decorator.
    needs : frozenset of str
        Signals that it reads: ``weights``, ``full_weights``, ``value_l1``, ``value_l2``, ``value_out_l1``,
        ``reconstruction``, ``token_kinds``, ``key_l2``, ``keys``, ``values``, ``queries``, ``mean_query``, ``rotary``,
        ``selection``, ``schedule``, ``gate:FILE``, ``filter:FILE``, ``scorer:FILE``.
    scope : {"kv_head", "layer"}
        Whether every key/value head decides separately, or one decision holds for the whole layer.
    phase : str
        When it evicts: at every ``step`` from the end of the prompt on, only at the end of the prompt (``prefill``), at
        the end of the prompt and then ``every:N`` steps, or never (``none``).
    bounded : bool
        Whether the engine holds it to a budget. An unbounded policy evicts the keys that it scores ``-inf``.
    reads : bool
        Whether it is a sparse reader: it holds every key, and `read` returns which of them a query sees.
    clairvoyant : bool
        Whether it is a bound that uses what no cache can know: later rows, or the row of the query for which it selects
        keys.
    allocate : str
        How the budget of the model is divided among layers and heads by default.
    prefills : frozenset of str
        Kinds of prefill for which the rule is defined.
    published : bool
        Whether it reproduces published code with its quirks instead of the plain rule.
    positional : tuple of str
        Parameters that a text may give without their names: ``union(h2o, tova)``.
    formula : str
        The rule in one line: the score ``S[j]`` of key ``j``, or what a reader reads; docs/policies/README.md names the
        symbols.
    marks : bool
        Whether it evicts exactly the keys that it scores ``-inf``, even if the budget would evict more or fewer: for
        rules that divide a budget in their own way.
    paper : str
        Source of the rule.
    citation : Citation or None
        Its publication, for ``kvscope policies --cite``; None if there is none. A derived class inherits it unless it
        sets its own.
    proven : str
        What its decisions were compared with, besides a plain loop of its rule: ``authors' decisions`` (their code was
        run), ``authors' code, read``, the same for ``kvpress``, ``paper``, or ``own rule``.
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
    positional: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[bool] = False
    formula: ClassVar[str] = ""
    marks: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    citation: ClassVar[Citation | None] = None
    proven: ClassVar[str] = ""

    def __new__(cls, *args: object, **parameters: object) -> Self:
        """Raise UsageError if a variant is passed as a parameter: each variant is a separate class."""
        if "variant" in parameters and any(item.name == "variant" and not item.init for item in fields(cls)):
            raise UsageError(
                f"{cls.__name__} takes no variant: each variant is a separate class",
                f"Use the text '{cls.name}:variant={parameters['variant']}', or import the class of the variant.",
            )
        return super().__new__(cls)

    @property
    def traits(self) -> Traits:
        """The properties that the engine needs; override this with `with_traits` if they depend on parameters."""
        return _own_traits(self)

    def with_traits(self, **changes: Any) -> Traits:
        """Return the traits of the class with some of them changed, for an override of `traits`."""
        return replace(_own_traits(self), **changes)

    def protect(self, budget: int) -> Protection:
        """Return which keys are never evicted, for a budget in keys; by default none."""
        return Protection()

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        """Raise UsageError if the policy is not defined for these layers of a model; by default it is."""

    def whole(self, place: int) -> bool:
        """Return whether a layer holds every key whatever the budget, which then applies to the other layers.

        `place` is the index of the layer among the layers with attention; by default no layer holds every key.
        """
        return False

    def read(self, step: Step) -> Tensor:
        """Return which keys query `t` sees, bool ``[R, L, S, n]``; called for sparse readers before the row is known.

        ``step.visible`` is true for every existing key, the current one included, and ``step.live`` is None.
        """
        raise NotImplementedError(f"{type(self).__name__} is a sparse reader and does not define read()")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        """Return the score of every key after this step, ``[R, L, S, n]``; the keys with the highest are retained.

        Parameters
        ----------
        step : Step
            The step that the query has completed.
        score : Tensor
            ``[R, L, S, n]``: the scores that this method returned at the previous step, and 0 for the new key.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define observe()")

    def recurrence(self) -> Recurrence | None:
        """Return the recurrence that `observe` computes, if it is one; the engine may then use a kernel.

        It must give exactly the scores of `observe` of the same class.
        """
        return None

    def parameters(self) -> dict[str, object]:
        """Return the parameters by name, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults: ``a2sf(alpha=0.7)``."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def _own_traits(policy: Policy) -> Traits:
    if "_traits" not in policy.__dict__:  # read once, since the engine asks at every step; no field, so never compared
        traits = Traits(**{item.name: getattr(policy, item.name) for item in fields(Traits)})
        object.__setattr__(policy, "_traits", traits)
    return policy.__dict__["_traits"]  # type: ignore[no-any-return]


def recurrence_of(policy: Policy) -> Recurrence | None:
    """Return the recurrence of a policy's `observe`, or None.

    A class that overrides `observe` must override `recurrence` too, since that of its base class is for another
    `observe`.
    """

    def owner(name: str) -> type:
        return next(cls for cls in type(policy).__mro__ if name in vars(cls))

    return policy.recurrence() if issubclass(owner("recurrence"), owner("observe")) else None


POLICIES: Registry[type[Policy]] = Registry("policy", "kvscope.policies", "kvscope.policies")
VARIANTS: Registry[type[Policy]] = Registry("variant", "kvscope.policies", "kvscope.policies")
P = TypeVar("P", bound=Policy)


def policy(name: str) -> Callable[[type[P]], type[P]]:
    """Return a decorator that registers a policy class under a name, by which commands and `replay` find it."""

    def register(cls: type[P]) -> type[P]:
        cls.name = name
        POLICIES.register(name, cls)
        return cls

    return register


def variant(policy: str, name: str) -> Callable[[type[P]], type[P]]:
    """Return a decorator that registers a class as a variant of a policy: ``policy:variant=name``.

    The class derives from that of the policy and overrides what differs; both have the same parameters.

    Raises
    ------
    UsageError
        If neither this class nor the policy's class declares `variant_parameter`.
    """

    def register(cls: type[P]) -> type[P]:
        if "variant" not in {item.name for item in fields(cls)}:
            raise UsageError(
                f"{cls.__name__} is a variant of {policy} and has no field for its name",
                'Declare it in the class: variant: str = variant_parameter("plain")',
            )
        cls.name = policy
        cls.variant = name  # type: ignore[attr-defined]  # the field's value, which is not set per instance
        VARIANTS.register(f"{policy}:variant={name}", cls)
        return cls

    return register


def variant_parameter(plain: str = "plain") -> Any:
    """Return the field ``variant`` of a policy that has variants; `plain` is the name of the policy's plain rule.

    The class determines its value: it is shown and stored with the parameters, and is not an argument.
    """
    help = "which rule: the policy's own, or a published code that differs from it"
    return field(default=plain, init=False, metadata={"help": help})


def parameter(default: object, help: str, search: Sequence[object] = ()) -> Any:
    """Return a field for a parameter of a policy: its default, a line of help, and values for ``kvscope tune``."""
    return field(default=default, metadata={"help": help, "search": tuple(search)})


def at_least(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise UsageError unless ``low <= value`` (and ``value <= high``): for a policy's ``__post_init__``."""
    if not value >= low or (high is not None and not value <= high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={value} is out of range", f"{name} must be {bound}.")
