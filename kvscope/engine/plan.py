"""How a policy is run: when it evicts, how its budget is allocated, and in which precision it accumulates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.engine.allocation import ALLOCATORS
from kvscope.gates.filters import load_filters
from kvscope.gates.module import load_gate
from kvscope.gates.scorers import load_scorers
from kvscope.policies.base import Phase, Policy, Scope
from kvscope.policies.own import protection_of

GATE = "gate:"  # prefix of a signal's name; the name of the gate follows
FILTER = "filter:"  # and that of the filters
SCORER = "scorer:"  # and that of the scorers
PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvictionPlan:
    """A policy, with the choices that the user may make for any policy.

    Attributes
    ----------
    policy : Policy
        Scores the keys.
    phase : str
        When keys are evicted: ``step``, ``prefill``, ``every:N`` or ``none``.
    allocate : str
        Name of the allocator.
    accumulate : torch.dtype or None
        Precision of live rows and scores; None for that of the simulation.
    scope : {"layer"} or None
        With ``layer`` the heads of a layer decide as one, as if all query heads were one group; None: as the policy's
        rule says.
    """

    policy: Policy
    phase: Phase
    allocate: str
    accumulate: torch.dtype | None = None
    scope: Scope | None = None

    @classmethod
    def published(cls, policy: Policy) -> EvictionPlan:
        """Return the plan with the choices of the policy's paper or code."""
        return cls(policy, policy.traits.phase, policy.traits.allocate)

    @classmethod
    def make(
        cls, policy: Policy, compress: str | None = None, allocate: str | None = None, accumulate: str | None = None
    ) -> EvictionPlan:
        """Return a plan with the user's choices in place of the published ones.

        Raises
        ------
        UsageError
            If a choice is unknown, or cannot be made for this policy; the message says why.
        """
        plan = cls.published(policy)
        traits = policy.traits
        why_not = _fixed(policy)
        for flag, given in (("--compress", compress), ("--allocate", allocate)):
            if given is not None and why_not and traits.phase != "none":
                raise UsageError(f"{flag} cannot be used with {policy.label}: it {why_not}", f"Omit {flag} for it.")
        if accumulate is not None and traits.clairvoyant:
            raise UsageError(
                f"--accumulate cannot be used with {policy.label}: it {why_not}", "Omit --accumulate for it."
            )
        if compress is not None and not why_not:
            plan = replace(plan, phase=parse_phase(compress))
        if allocate is not None and not why_not:
            plan = replace(plan, allocate=_allocation(policy, allocate))
        if accumulate is not None:
            if accumulate not in PRECISIONS:
                raise UsageError(f"precision {accumulate!r} is unknown", f"Known: {', '.join(PRECISIONS)}.")
            plan = replace(plan, accumulate=PRECISIONS[accumulate])
        return plan

    @property
    def decides(self) -> Scope:
        """Whether each key/value head decides, or the layer."""
        return self.scope or self.policy.traits.scope

    @property
    def needs(self) -> frozenset[str]:
        """Signals that the policy or its allocator reads."""
        return self.policy.traits.needs | ALLOCATORS.get(self.allocate).needs

    @property
    def gates(self) -> list[str]:
        """Names of the gates that the policy uses."""
        return [name.removeprefix(GATE) for name in sorted(self.needs) if name.startswith(GATE)]

    @property
    def filters(self) -> list[str]:
        """Names of the filters that the policy uses."""
        return [name.removeprefix(FILTER) for name in sorted(self.needs) if name.startswith(FILTER)]

    @property
    def scorers(self) -> list[str]:
        """Names of the scorers that the policy uses."""
        return [name.removeprefix(SCORER) for name in sorted(self.needs) if name.startswith(SCORER)]

    @property
    def reads_inputs(self) -> bool:
        """Whether it reads the inputs of layers, through a gate or scorers."""
        return any(name.startswith((GATE, SCORER)) for name in self.needs)

    @property
    def looks_across(self) -> bool:
        """Whether all layers must be stepped together."""
        return ALLOCATORS.get(self.allocate).looks_across

    @property
    def label(self) -> str:
        """The policy's label, with what differs from the published plan: ``h2o [every:16, ada]``."""
        published = EvictionPlan.published(self.policy)
        choices = ((self.phase, published.phase), (self.allocate, published.allocate))
        different = [value for value, usual in choices if value != usual]
        if self.decides != self.policy.traits.scope:
            different.append(f"per {self.decides}")
        if self.accumulate is not None:
            different.append(str(self.accumulate).removeprefix("torch."))
        return f"{self.policy.label} [{', '.join(different)}]" if different else self.policy.label

    def require(self, prefill: Prefill) -> None:
        """Raise UsageError if the plan is not defined for this prefill, or a file that it uses does not exist."""
        for name in self.gates:
            load_gate(name).facts.require_prefill(prefill, name)
        for name in self.filters:
            load_filters(name)
        for name in self.scorers:
            load_scorers(name)
        if prefill not in self.policy.traits.prefills:
            other = ", ".join(sorted(self.policy.traits.prefills))
            raise UsageError(
                f"{self.policy.label} is not defined for {prefill} prefill", f"Use --prefill {other} for it."
            )
        if prefill == "stream" and self.phase == "prefill":
            raise UsageError(
                f"{self.policy.label} evicts at the end of the prompt only, and streaming prefill evicts at every step",
                "Use --prefill full, or --compress step.",
            )
        if prefill == "stream" and ALLOCATORS.get(self.allocate).when == "prompt":
            raise UsageError(
                f"allocation {self.allocate} needs the whole prompt, and streaming prefill evicts before its end",
                "Use --prefill full, or another --allocate.",
            )

    def compresses(self, t: int, prompt: int, prefill: Prefill) -> bool:
        """Return whether keys are evicted at the end of step `t`."""
        return t in self.evicting_steps(prompt, t + 1, prefill)

    def evicting_steps(self, prompt: int, length: int, prefill: Prefill) -> range:
        """Return the steps before `length` at whose end keys are evicted."""
        if self.phase == "none" or (self.phase == "prefill" and prefill == "stream"):
            return range(0)
        if self.phase == "prefill":
            return range(prompt - 1, min(prompt, length))
        every = 1 if self.phase == "step" else int(self.phase.removeprefix("every:"))
        return range(prompt - 1 if prefill == "full" else every - 1, length, every)


def parse_phase(text: str) -> Phase:
    """Return a phase: ``prefill``, ``step`` or ``every:N``; raises UsageError for anything else."""
    kind, _, count = text.partition(":")
    if kind in ("prefill", "step") and not count:
        return kind
    if kind == "every" and count.isdecimal() and int(count) > 0:
        return f"every:{int(count)}" if int(count) > 1 else "step"
    raise UsageError(f"--compress {text!r} is unknown", "Use prefill, step, or every:N with a number of steps.")


def protection(policy: Policy, budget: int, prompt: int) -> tuple[int, int]:
    """Return how many first and last keys are never evicted."""
    kept = protection_of(policy, budget)
    return max(kept.sinks, prompt) if kept.prompt else kept.sinks, kept.recent


def require_room(policy: Policy, budget: int, prompt: int) -> None:
    """Raise UsageError if protected keys alone exceed the budget."""
    sinks, recent = protection(policy, budget, prompt)
    if sinks + recent > budget:
        what = f"the prompt of {prompt}" if protection_of(policy, budget).prompt else f"{sinks} first"
        raise UsageError(
            f"{policy.label} protects {what} and {recent} last keys, more than the budget of {budget}",
            "Raise the budget, or protect fewer keys.",
        )


def _fixed(policy: Policy) -> str:
    """Return why a policy's phase and allocation cannot be chosen, as the end of a sentence; empty if they can be."""
    traits = policy.traits
    if traits.phase == "none":
        return "evicts nothing"
    if traits.clairvoyant:
        return "is a bound: the best that is possible with the same budget for every head and step"
    if traits.reads:
        return "reads a part of the cache and evicts nothing"
    if not traits.bounded:
        return "decides itself how many keys it evicts"
    return "reproduces published code" if traits.published else ""


def _allocation(policy: Policy, name: str) -> str:
    allocator = ALLOCATORS.get(name)
    if allocator.spans == "heads" and policy.traits.scope == "layer":
        raise UsageError(
            f"allocation {name} gives each head its own budget, and {policy.label} decides per layer",
            "Use --allocate pyramid or cake for it.",
        )
    return name
