"""A policy whose parameters differ between layers or heads, as found by ``kvscope tune``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.seal import SEAL, is_changed
from kvscope.policies.base import Policy, Protection, Step, Traits


@dataclass(frozen=True)
class Tuned(Policy):
    """One policy with several settings, one of which applies to each layer or head.

    Attributes
    ----------
    source : str
        Name of the file that the settings are from, for labels.
    settings : tuple of Policy
        The same policy with different parameters; they must protect the same keys.
    layers : tuple of int
        Numbers of the layers that were tuned.
    choice : tuple of tuple of int
        For each of these layers the number of its setting, or one number for each key/value head.

    Raises
    ------
    UsageError
        If the settings cannot be combined, or the choice names one that does not exist.
    """

    name = "tuned"
    paper = "kvscope tune"

    source: str
    settings: tuple[Policy, ...]
    layers: tuple[int, ...]
    choice: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        numbers = {number for row in self.choice for number in row}
        complete = self.settings and self.layers and len(self.layers) == len(self.choice) and all(self.choice)
        if not complete or not numbers <= set(range(len(self.settings))):
            raise UsageError(f"{self.source}: the choice does not match the layers and settings", "Tune again.")
        first = self.settings[0]
        if any(type(policy) is not type(first) or policy.traits != first.traits for policy in self.settings):
            raise UsageError(
                f"{self.label}: the settings differ in policy, scope, phase or signals",
                "Tune parameters that change neither scope, phase nor signals, or use --per model.",
            )
        if first.traits.reads or not first.traits.bounded:
            raise UsageError(f"{first.label} has no budget, so it cannot be tuned for one", "Tune another policy.")

    @property
    def traits(self) -> Traits:
        """Those of the policy that was tuned."""
        return self.settings[0].traits

    @property
    def label(self) -> str:
        """The name of the policy and the file: ``a2sf(@tuned.toml)``."""
        return f"{self.settings[0].name}(@{self.source})"

    def parameters(self) -> dict[str, object]:
        """Return the settings and who follows which, as plain data."""
        return {
            "tuned": self.source,
            "settings": [policy.parameters() for policy in self.settings],
            "layers": list(self.layers),
            "choice": [list(row) for row in self.choice],
        }

    def protect(self, budget: int) -> Protection:
        kept = {policy.protect(budget) for policy in self.settings}
        if len(kept) > 1:
            raise UsageError(
                f"{self.label}: at {budget} keys the settings protect different keys",
                "Tune parameters that do not change which keys are protected, or use --per model.",
            )
        return kept.pop()

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        """Raise UsageError where a layer or head has no setting, or a setting is for a layer that does not exist."""
        heads = 1 if self.traits.scope == "layer" else kv_heads
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown:
            why = f"not for layer {unknown[0]}"
        elif max(self.layers) >= n_layers:
            why = f"for layer {max(self.layers)}, of {n_layers} in the model"
        elif any(len(self.choice[self.layers.index(layer)]) not in (1, heads) for layer in layers):
            why = f"not for {heads} key/value heads"
        else:
            return
        raise UsageError(f"{self.source} was tuned {why}", "Tune on a trace of this model.")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        memory = step.memory
        if "chosen" not in memory:
            layers = step.layers.tolist()
            self.fit(layers, step.kv_heads, max(self.layers) + 1)
            rows = [self.choice[self.layers.index(layer)] for layer in layers]
            chosen = torch.tensor([row * score.shape[2] if len(row) == 1 else row for row in rows])  # [L, S]
            memory["chosen"] = chosen.to(score.device)
            memory["own"] = {number: {} for number in sorted({number for row in rows for number in row})}
        result = score
        for number, own in memory["own"].items():
            # computed for every head; only the heads that follow this setting take the result
            made = self.settings[number].observe(replace(step, memory=own), score.clone())
            result = torch.where((memory["chosen"] == number)[:, :, None], made, result)
        return result


def read_tuned(file: Path, cls: type[Policy], build: Callable[[type[Policy], Mapping[str, str]], Policy]) -> Tuned:
    """Return the policy that ``kvscope tune`` wrote to a TOML file: ``--policy a2sf:@tuned.toml``.

    Parameters
    ----------
    file : Path
        What ``kvscope tune`` wrote.
    cls : type
        Class of the policy.
    build : callable
        Makes one of that class from the text of its parameters.

    Raises
    ------
    UsageError
        If there is no such file, it was not written by ``kvscope tune``, or it is for another policy or another
        version of it.
    ResultError
        If its checksum differs from its content.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        policy, layers = data["policy"], tuple(map(_whole, data["layers"]))
        choice = tuple(tuple(map(_whole, row)) for row in data["choice"])
        settings = [{name: _text(value) for name, value in own.items()} for own in data["settings"]]
        changed = is_changed(data)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "Write it with: kvscope tune -o FILE") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file} is not a result of kvscope tune: {why}", "Write it with: kvscope tune") from error
    if changed:
        raise ResultError(
            f"{file} is damaged: its checksum differs from its content",
            f"Tune again; without the line {SEAL} it is read as it is.",
        )
    if policy != cls.name:
        raise UsageError(f"{file} tunes {policy}, not {cls.name}", f"Write {policy}:@{file}")
    return Tuned(file.name, tuple(build(cls, own) for own in settings), layers, choice)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _text(value: object) -> str:
    """Return a value of a TOML file as on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
