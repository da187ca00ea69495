"""What the training of a gate may choose: the gate itself, and how it is trained. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvscope.core.errors import UsageError


class EvictionLoss(StrEnum):
    """How keeping more keys than the target is counted; see `kvscope.training.objective.eviction_loss`."""

    one_sided = "one-sided"
    absolute = "absolute"
    square = "square"


class GateForm(StrEnum):
    """What a token's gate looks at: the tokens up to its own, or, for tokens of the prompt, the whole prompt."""

    causal = "causal"
    bidirectional = "bidirectional"


@dataclass(frozen=True)
class GateDesign:
    """What a gate is, apart from its model.

    Attributes
    ----------
    heads, size : int
        Heads of the gate's own attention, and the size of one.
    form : GateForm
        What a token's gate looks at.
    tau : float
        A key whose gate, 0 to 1, is at or below this is evicted.
    sinks : int
        First tokens whose gates are always open.

    Raises
    ------
    UsageError
        For a value out of its range.
    """

    heads: int = 2
    size: int = 16
    form: GateForm = GateForm.causal
    tau: float = 0.5
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.heads < 1 or self.size < 1 or self.sinks < 0 or not 0 < self.tau < 1:
            raise UsageError(
                f"a gate of {self.heads} heads of size {self.size}, threshold {self.tau}, {self.sinks} sinks makes no "
                "sense",
                "Use heads and sizes of 1 or more, a threshold between 0 and 1, 0 sinks or more.",
            )


@dataclass(frozen=True)
class TrainingSettings:
    """How a gate is trained.

    Attributes
    ----------
    target_keep : float
        Share of keys that should be retained.
    eviction : EvictionLoss
        How a layer that keeps more than the target is counted.
    strength : float
        Factor of the eviction loss beside the loss of the task.
    steps : int
        At most; the learning rate falls to zero over them.
    rate : float
        Learning rate at the start.
    every : int
        Steps between two looks at what is not trained on, each of which leaves a checkpoint.
    patience : int
        Looks without an improvement after which training stops.
    ramp : float
        Share of the steps over which the target falls from every key to `target_keep`: gates that are pushed down at
        once shut together, and where all are shut none has a gradient left.

    Raises
    ------
    UsageError
        For a value out of its range.
    """

    target_keep: float = 0.5
    eviction: EvictionLoss = EvictionLoss.square
    strength: float = 40.0
    steps: int = 400
    rate: float = 0.003
    every: int = 25
    patience: int = 6
    ramp: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.target_keep < 1:
            raise UsageError(f"a target of {self.target_keep} is not a share", "Use --target-keep between 0 and 1.")
        for name in ("steps", "every", "patience", "rate", "strength"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} is not above 0", "Use a larger number.")
        if not 0 <= self.ramp <= 1:
            raise UsageError(f"a ramp of {self.ramp} is not a share of the steps", "Use --ramp between 0 and 1.")

    def target(self, step: int) -> float:
        """Return the share of keys that should be retained at a step."""
        remaining = 1 - step / (self.ramp * self.steps) if self.ramp else 0.0
        return self.target_keep + (1 - self.target_keep) * max(0.0, remaining)


@dataclass(frozen=True)
class TextWindows:
    """How much of the texts is read at a time.

    Attributes
    ----------
    window : int
        Tokens of one sequence.
    tokens : int
        Tokens of one step.

    Raises
    ------
    UsageError
        For a window below 2 tokens, or a step that does not hold one.
    """

    window: int = 256
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.window < 2 or self.tokens < self.window:
            raise UsageError(
                f"windows of {self.window} tokens, {self.tokens} a step, make no sense",
                "Use --tokens of --window or more.",
            )

    @property
    def batch(self) -> int:
        """Sequences of one step."""
        return self.tokens // self.window


@dataclass(frozen=True)
class ScorerSettings:
    """How scorers of keys are trained.

    Attributes
    ----------
    width : int
        Size of the hidden layer of a scorer; 0 for a linear one, which is computed in one step.
    tokens : int
        Random tokens of each prompt that are trained on.
    epochs, batch : int
        Passes over the tokens, and tokens of a step.
    rate : float
        Learning rate at the start; it falls to zero.
    seed : int
        Seed of all random numbers.

    Raises
    ------
    UsageError
        For a value out of its range.
    """

    width: int = 512
    tokens: int = 500
    epochs: int = 15
    batch: int = 512
    rate: float = 0.005
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 0:
            raise UsageError(f"a width of {self.width} is below 0", "Use --width 0 for linear scorers, or a size.")
        for name in ("tokens", "epochs", "batch", "rate"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} is not above 0", "Use a larger number.")
