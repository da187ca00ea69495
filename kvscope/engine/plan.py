"""How a policy is run: when it evicts, how its budget is shared out, in which precision it sums."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.engine.allocation import ALLOCATORS
from kvscope.gates.module import load_gate
from kvscope.policies.base import Phase, Policy

GATE = "gate:"  # before the name of a gate, in the name of its signal
PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EvictionPlan:
    """A policy and the choices that are not its own.

    Attributes
    ----------
    policy : Policy
        What scores the keys.
    phase : str
        When it evicts: ``step``, ``prefill``, ``every:N`` or ``none``.
    allocate : str
        Name of the allocator.
    accumulate : torch.dtype or None
        Precision of live rows and sums; None is that of the replay.
    """

    policy: Policy
    phase: Phase
    allocate: str
    accumulate: torch.dtype | None = None

    @classmethod
    def published(cls, policy: Policy) -> EvictionPlan:
        """Return the plan that the policy's paper or code follows."""
        return cls(policy, policy.traits.phase, policy.traits.allocate)

    @classmethod
    def make(
        cls, policy: Policy, compress: str | None = None, allocate: str | None = None, accumulate: str | None = None
    ) -> EvictionPlan:
        """Return a plan with the user's choices in place of the published ones.

        Raises
        ------
        UsageError
            If a choice is unknown, or makes no sense for this policy; the message says why.
        """
        plan = cls.published(policy)
        traits = policy.traits
        why_not = _fixed(policy)
        for flag, given in (("--compress", compress), ("--allocate", allocate)):
            if given is not None and why_not and traits.phase != "none":
                raise UsageError(f"{flag} does not go with {policy.label}: it {why_not}", f"Leave {flag} out for it.")
        if accumulate is not None and traits.clairvoyant:
            raise UsageError(
                f"--accumulate does not go with {policy.label}: it {why_not}", "Leave --accumulate out for it."
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
    def needs(self) -> frozenset[str]:
        """Signals that the policy or its allocator reads."""
        return self.policy.traits.needs | ALLOCATORS.get(self.allocate).needs

    @property
    def gates(self) -> list[str]:
        """Names of the gates that the policy asks."""
        return [name.removeprefix(GATE) for name in sorted(self.needs) if name.startswith(GATE)]

    @property
    def looks_across(self) -> bool:
        """Whether all layers must be stepped together."""
        return ALLOCATORS.get(self.allocate).looks_across

    @property
    def label(self) -> str:
        """The policy's label, with what differs from the published plan: ``h2o [every:16, ada]``."""
        usual = EvictionPlan.published(self.policy)
        own = [value for value, known in ((self.phase, usual.phase), (self.allocate, usual.allocate)) if value != known]
        if self.accumulate is not None:
            own.append(str(self.accumulate).removeprefix("torch."))
        return f"{self.policy.label} [{', '.join(own)}]" if own else self.policy.label

    def require(self, prefill: Prefill) -> None:
        """Raise UsageError where the plan makes no sense under this prefill, or names a gate that is not there."""
        for name in self.gates:
            load_gate(name).facts.require_prefill(prefill, name)
        if prefill not in self.policy.traits.prefills:
            other = ", ".join(sorted(self.policy.traits.prefills))
            raise UsageError(
                f"{self.policy.label} is not defined for {prefill} prefill", f"Use --prefill {other} for it."
            )
        if prefill == "stream" and self.phase == "prefill":
            raise UsageError(
                f"{self.policy.label} compresses at the end of the prompt, which streaming prefill does not have",
                "Use --prefill full, or --compress step.",
            )
        if prefill == "stream" and ALLOCATORS.get(self.allocate).when == "prompt":
            raise UsageError(
                f"allocation {self.allocate} looks at the whole prompt, and streaming prefill evicts before its end",
                "Use --prefill full, or another --allocate.",
            )

    def compresses(self, t: int, prompt: int, prefill: Prefill) -> bool:
        """Return whether the engine evicts at the end of step `t`."""
        if self.phase == "none" or (prefill == "full" and t < prompt - 1):
            return False
        since = t - (prompt - 1) if prefill == "full" else t + 1
        if self.phase == "prefill":
            return since == 0
        return self.phase == "step" or since % int(self.phase.removeprefix("every:")) == 0


def parse_phase(text: str) -> Phase:
    """Return a phase: ``prefill``, ``step`` or ``every:N``; raises UsageError for anything else."""
    kind, _, count = text.partition(":")
    if kind in ("prefill", "step") and not count:
        return kind
    if kind == "every" and count.isdecimal() and int(count) > 0:
        return f"every:{int(count)}" if int(count) > 1 else "step"
    raise UsageError(f"--compress {text!r} is unknown", "Write prefill, step, or every:N with a number of steps.")


def protection(policy: Policy, budget: int, prompt: int) -> tuple[int, int]:
    """Return how many first and last keys are never evicted."""
    kept = policy.protect(budget)
    return max(kept.sinks, prompt) if kept.prompt else kept.sinks, kept.recent


def require_room(policy: Policy, budget: int, prompt: int) -> None:
    """Raise UsageError if protected keys alone exceed the budget."""
    sinks, recent = protection(policy, budget, prompt)
    if sinks + recent > budget:
        what = f"the prompt of {prompt}" if policy.protect(budget).prompt else f"{sinks} first"
        raise UsageError(
            f"{policy.label} protects {what} and {recent} last keys, more than the budget of {budget}",
            "Raise the budget, or protect fewer keys.",
        )


def _fixed(policy: Policy) -> str:
    """Return why a policy's phase and allocation cannot be chosen, or nothing."""
    traits = policy.traits
    if traits.phase == "none":
        return "evicts nothing"
    if traits.clairvoyant:
        return "is a bound, the best that is possible at one budget for every head and step"
    if traits.reads:
        return "reads a part of the cache and evicts nothing"
    if not traits.bounded:
        return "decides itself how much it evicts"
    return "reproduces a published code" if traits.published else ""


def _allocation(policy: Policy, name: str) -> str:
    allocator = ALLOCATORS.get(name)
    if allocator.spans == "heads" and policy.traits.scope == "layer":
        raise UsageError(
            f"allocation {name} shares a layer's budget among its heads, and {policy.label} decides per layer",
            "Use --allocate pyramid or cake for it.",
        )
    return name
