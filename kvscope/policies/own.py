"""What a policy that is not part of kvscope returns, checked; its exceptions are explained by the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.policies.base import Policy, Protection, Recurrence, Step
from kvscope.policies.recurrence import Arrivals

Observe = Callable[[Step, Tensor], Tensor]
Read = Callable[[Step], Tensor]


def is_own(policy: Policy) -> bool:
    """Return whether a policy is defined outside kvscope."""
    return not type(policy).__module__.startswith("kvscope.")


def observe_of(policy: Policy) -> Observe:
    """Return ``policy.observe``; that of an own policy raises ReplayError unless it returns a score for each key."""
    if not is_own(policy):
        return policy.observe

    def observe(step: Step, score: Tensor) -> Tensor:
        expected = tuple(score.shape)
        made: object = policy.observe(_copy(step), score)
        return _numbers(policy, "observe", made, expected, "floating-point scores", torch.Tensor.is_floating_point)

    return observe


def read_of(policy: Policy) -> Read:
    """Return ``policy.read``; that of an own policy raises ReplayError unless it returns true or false for each key."""
    if not is_own(policy):
        return policy.read

    def read(step: Step) -> Tensor:
        made: object = policy.read(_copy(step))
        return _numbers(policy, "read", made, tuple(step.visible.shape), "booleans", lambda it: it.dtype == torch.bool)

    return read


def fixed_of(policy: Policy, rule: Recurrence, keys: Arrivals, expected: tuple[int, ...]) -> Tensor:
    """Return ``rule.fixed(keys)``; raises ReplayError if that of an own policy is not a score for each key."""
    if is_own(policy):
        keys = replace(keys, positions=keys.positions.clone(), signals=_copies(keys.signals))
    made: object = rule.fixed(keys)
    return _numbers(
        policy, "recurrence", made, expected, "scores", lambda it: not (it.is_complex() or it.dtype == torch.bool)
    )


def protection_of(policy: Policy, budget: int) -> Protection:
    """Return ``policy.protect(budget)``; raises ReplayError if an own policy returns anything else."""
    kept: object = policy.protect(budget)
    if not isinstance(kept, Protection):
        raise _wrong(policy, "protect", f"returned {_kind(kept)}", "Return Protection(sinks=..., recent=...).")
    return kept


def _copy(step: Step) -> Step:
    """Return a step whose tensors are copies: what an own policy writes into them must not reach other policies."""
    return replace(
        step,
        layers=step.layers.clone(),
        budget=step.budget.clone(),
        budgets=list(step.budgets),
        visible=step.visible.clone(),
        signals=_copies(step.signals),
        live=None if step.live is None else _cloned(step.live),
        draw=lambda seed: step.draw(seed).clone(),
    )


def _copies(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _cloned(signal) for name, signal in signals.items()}


def _cloned(values: Tensor) -> Tensor:
    """Return a copy; of values that all runs share a single one, so that what is computed of them is so once."""
    if len(values) > 1 and values.stride(0) == 0:
        return values[:1].clone().expand_as(values)
    return values.clone()


def _numbers(
    policy: Policy, method: str, made: object, expected: tuple[int, ...], what: str, of_type: Callable[[Tensor], bool]
) -> Tensor:
    """Return a result that is a tensor of the expected shape and type; raise ReplayError for any other."""
    todo = f"Return one value for each key: {what} of shape {expected}."
    if not isinstance(made, Tensor):
        raise _wrong(policy, method, f"returned {_kind(made)}", todo)
    if not _fits(tuple(made.shape), expected):
        raise _wrong(policy, method, f"returned the shape {tuple(made.shape)}", todo)
    if not of_type(made):
        raise _wrong(policy, method, f"returned {made.dtype}", todo)
    return made


def _fits(made: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether there is one value for each key, the same for all runs, layers or heads along an axis of 1."""
    sizes = zip(reversed(made[:-1]), reversed(expected[:-1]), strict=False)
    return made[-1:] == expected[-1:] and len(made) <= len(expected) and all(size in (1, full) for size, full in sizes)


def _wrong(policy: Policy, method: str, what: str, todo: str) -> ReplayError:
    function = inspect.unwrap(getattr(type(policy), method))
    code = function.__code__
    return ReplayError(f"your policy {code.co_filename}:{code.co_firstlineno}: {method} {what}", todo)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
