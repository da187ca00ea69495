"""A policy whose parameters differ from layer to layer or head to head, as ``kvscope tune`` found them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvscope.errors import UsageError
from kvscope.policies.base import Policy, Protection, Step, Traits


@dataclass(frozen=True)
class Tuned(Policy):
    """One policy under several settings, of which each layer or head follows one.

    Attributes
    ----------
    source : str
        Where the choice comes from, for labels: the name of a file.
    settings : tuple of Policy
        The same policy with different parameters; what they protect must not differ.
    choice : tuple of tuple of int
        For each layer the number of its setting, or those of its key/value heads.
    """

    name = "tuned"
    paper = "kvscope tune"

    source: str
    settings: tuple[Policy, ...]
    choice: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        first = self.settings[0]
        if any(type(policy) is not type(first) or policy.traits != first.traits for policy in self.settings):
            raise UsageError(
                f"{self.label}: the settings are not of one kind",
                "Tune parameters that change neither scope, phase nor signals.",
            )
        if first.traits.reads or not first.traits.bounded:
            raise UsageError(f"{first.label} holds no budget: it cannot be tuned by head", "Tune another policy.")
        if max(max(row) for row in self.choice) >= len(self.settings):
            raise UsageError(f"{self.source} names a setting that it does not have", "Tune again.")

    @property
    def traits(self) -> Traits:
        """Those of the policy that was tuned."""
        return self.settings[0].traits

    @property
    def label(self) -> str:
        """The name of the policy and the file: ``a2sf(@tuned.toml)``."""
        return f"{self.settings[0].name}(@{self.source})"

    def parameters(self) -> dict[str, Any]:
        """Return the settings and who follows which, as plain data."""
        return {
            "tuned": self.source,
            "settings": [policy.parameters() for policy in self.settings],
            "choice": [list(row) for row in self.choice],
        }

    def protect(self, budget: int) -> Protection:
        kept = {policy.protect(budget) for policy in self.settings}
        if len(kept) > 1:
            raise UsageError(
                f"{self.label}: settings protect different keys", "Tune parameters that do not change what stays."
            )
        return kept.pop()

    def observe(self, step: Step, score: Tensor) -> Tensor:
        heads = score.shape[2]
        chosen = self._chosen(step, heads)  # [L, S]
        result = torch.empty_like(score)
        mine, states = step.memory, step.memory.setdefault("states", [{} for _ in self.settings])
        for number, policy in enumerate(self.settings):
            state = states[number]
            step.memory = state.setdefault("memory", {})
            before = state.get("score", score[..., :0])
            made = policy.observe(step, torch.nn.functional.pad(before, (0, score.shape[-1] - before.shape[-1])))
            state["score"] = made
            result = torch.where((chosen == number)[None, :, :, None], made, result)
        step.memory = mine
        return result

    def _chosen(self, step: Step, heads: int) -> Tensor:
        layers = step.layers.tolist()
        if max(layers) >= len(self.choice):
            raise UsageError(f"{self.source} was tuned for {len(self.choice)} layers", "Tune on a trace of this model.")
        rows = [self.choice[layer] for layer in layers]
        if any(len(row) not in (1, heads) for row in rows):
            raise UsageError(f"{self.source} was not tuned for {heads} heads", "Tune on a trace of this model.")
        return torch.tensor([row * heads if len(row) == 1 else row for row in rows], device=step.budget.device)


def read_tuned(file: Path, cls: type[Policy]) -> Tuned:
    """Return the policy that ``kvscope tune`` wrote to a TOML file: ``--policy a2sf:@tuned.toml``.

    Raises
    ------
    UsageError
        If there is no such file, it was not written by ``kvscope tune``, or it is about another policy.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        policy, settings, choice = data["policy"], data["settings"], data["choice"]
        rows = tuple(tuple(map(int, row)) for row in choice)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "Write it with: kvscope tune -o FILE") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{file} is no result of kvscope tune: {error}", "Write it with: kvscope tune") from error
    if policy != cls.name:
        raise UsageError(f"{file} tunes {policy}, not {cls.name}", f"Write {policy}:@{file}")
    known = {item.name for item in fields(cls)}
    unknown = sorted({name for own in settings for name in own} - known)
    if unknown:
        raise UsageError(f"{file} sets {unknown[0]}, which {cls.name} does not have", "Tune again with this version.")
    return Tuned(file.name, tuple(cls(**own) for own in settings), rows)
