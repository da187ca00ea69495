"""Calls of a policy that is not part of kvscope: its errors are named with their place, its results are checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from kvscope.core.errors import KvscopeError, ReplayError
from kvscope.policies.base import Policy, Protection, Step

USER_FILE = "kvscope_user_"  # how the names of modules begin that `load_class` makes of files
Observe = Callable[[Step, Tensor], Tensor]


def is_own(policy: Policy) -> bool:
    """Return whether a policy is defined outside kvscope."""
    return not type(policy).__module__.startswith("kvscope.")


def observe_of(policy: Policy) -> Observe:
    """Return ``policy.observe``; that of a policy from outside kvscope raises ReplayError for every fault of its own.

    Faults are any exception, ``sys.exit`` included, and a result that is not a floating-point tensor with one score
    for each key.
    """
    return _Observed(policy) if is_own(policy) else policy.observe


def protection_of(policy: Policy, budget: int) -> Protection:
    """Return ``policy.protect(budget)``; raises ReplayError as `observe_of` does."""
    if not is_own(policy):
        return policy.protect(budget)
    try:
        kept: object = policy.protect(budget)
    except (Exception, SystemExit) as error:
        raise explained(policy, error) from error
    if not isinstance(kept, Protection):
        raise _wrong(policy, "protect", f"returned {_kind(kept)}", "Return Protection(sinks=..., recent=...).")
    return kept


class _Observed:
    """Calls ``observe`` of a policy and checks what it returns."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, step: Step, score: Tensor) -> Tensor:
        expected = tuple(score.shape)
        try:
            made: object = self._policy.observe(step, score)
        except (Exception, SystemExit) as error:
            raise explained(self._policy, error) from error
        todo = f"Return one score for each key: a tensor of shape {expected}."
        if not isinstance(made, Tensor):
            raise _wrong(self._policy, "observe", f"returned {_kind(made)}", todo)
        if not _fits(made, score):
            raise _wrong(self._policy, "observe", f"returned the shape {tuple(made.shape)}", todo)
        if not made.dtype.is_floating_point:
            raise _wrong(self._policy, "observe", f"returned {made.dtype}", "Return floating-point scores.")
        return made


def explained(policy: Policy, error: BaseException) -> BaseException:
    """Return the ReplayError for an exception inside a policy; errors of kvscope and of memory as they are."""
    if isinstance(error, KvscopeError | MemoryError | torch.OutOfMemoryError):
        return error
    what = "sys.exit was called" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    return ReplayError(f"your policy {_place(policy, error.__traceback__)}: {what}", "Correct the policy.")


def _place(policy: Policy, trace: TracebackType | None) -> str:
    """Return file and line of the innermost frame of the policy's own module."""
    place = _definition(policy)
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module == type(policy).__module__ or module.startswith(USER_FILE):
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _wrong(policy: Policy, method: str, what: str, todo: str) -> ReplayError:
    return ReplayError(f"your policy {_definition(policy, method)}: {method} {what}", todo)


def _definition(policy: Policy, method: str = "observe") -> str:
    code = getattr(getattr(type(policy), method), "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    return inspect.getfile(type(policy))


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _fits(made: Tensor, score: Tensor) -> bool:
    """Return whether a result has one score for each key, the same for all runs, layers or heads along an axis of 1."""
    sizes = zip(reversed(made.shape[:-1]), reversed(score.shape[:-1]), strict=False)
    return (
        made.shape[-1:] == score.shape[-1:]
        and made.ndim <= score.ndim
        and all(size in (1, full) for size, full in sizes)
    )
