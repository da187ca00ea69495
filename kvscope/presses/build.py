"""From the text of a press to the press: classes of the installed kvpress, with the arguments that the text gives."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Protocol

from kvscope.core.errors import UsageError
from kvscope.core.registry import nearest
from kvscope.policies.press import PREFIX, PressCall, Value
from kvscope.presses.support import SUPPORTED, require_supported

EAGER = frozenset({"ObservedAttentionPress"})  # presses that read the rows of attention, which this kernel returns
VERSIONS = ("0.5",)  # of kvpress, whose presses were compared


class Built(Protocol):
    """A press of kvpress."""

    compression_ratio: float

    def __call__(self, model: object) -> object:
        """Return the context manager that puts the press into a model."""


@cache
def kvpress() -> ModuleType:
    """Return the installed kvpress; what it changes in transformers when it is imported is restored.

    Raises
    ------
    UsageError
        If kvpress is not installed, cannot be imported, or is of another version than those compared.
    """
    try:
        found = version("kvpress")
    except PackageNotFoundError:
        raise UsageError(
            "kvpress is not installed, and policies that begin with kvpress: run its presses",
            "Install it: pip install 'kvscope[kvpress]'",
        ) from None
    if not found.startswith(tuple(f"{known}." for known in VERSIONS)):
        raise UsageError(
            f"kvpress {found} is installed, and its presses were not compared with those of {VERSIONS[0]}",
            "Install the compared version: pip install 'kvscope[kvpress]'",
        )
    from kvscope.model.foreign_hooks import attention_functions_as_before  # loads transformers

    try:
        with attention_functions_as_before(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that it imports
            import kvpress as module
    except ImportError as error:
        raise UsageError(
            f"kvpress {found} cannot be imported: {str(error).splitlines()[0]}",
            "Install it with what it needs: pip install 'kvscope[kvpress]'",
        ) from error
    return module  # type: ignore[no-any-return,unused-ignore]  # untyped, where it is installed


def build(call: PressCall) -> Built:
    """Return the press that a call writes.

    Raises
    ------
    UsageError
        If kvpress is not installed, has no such press, or refuses the arguments; if the press cannot be followed.
    """
    require_supported(call)
    made: Built = _made(call, kvpress())
    return made


def reads_rows(call: PressCall) -> bool:
    """Return whether a press, or one in its arguments, needs the kernel that returns the rows of attention."""
    return any(each.name in EAGER for each in call.nested())


def _made(call: PressCall, module: ModuleType) -> Built:
    presses = {name: it for name, it in vars(module).items() if _is_press(it, module)}
    if call.name not in presses:
        followed = [name for name in presses if name in SUPPORTED]
        raise UsageError(
            f"kvpress {version('kvpress')} has no press called {call.name!r}", nearest(call.name, followed)
        )
    cls = presses[call.name]
    if call.name not in SUPPORTED and not issubclass(cls, module.ScorerPress):
        raise UsageError(
            f"{PREFIX}{call.name} cannot be followed: it is neither a ScorerPress nor a wrapper that was compared",
            "Use another press; docs/kvpress.md lists those that can be followed.",
        )
    known = inspect.signature(cls).parameters
    for name, _ in call.settings:
        if name not in known:
            raise UsageError(f"{call.name} has no parameter {name!r}", nearest(name, list(known)))
    positional = [_value(each, module) for each in call.presses]
    named = {name: _value(each, module) for name, each in call.settings}
    try:
        made: Built = cls(*positional, **named)
    except Exception as error:  # an assertion of kvpress, whatever its class
        raise UsageError(
            f"{PREFIX}{call} cannot be made: {said(error)}", f"Its parameters are: {', '.join(known)}."
        ) from error
    return made


def _value(value: Value, module: ModuleType) -> object:
    if isinstance(value, tuple):
        return [_value(each, module) for each in value]
    return _made(value, module) if isinstance(value, PressCall) else value


def _is_press(it: object, module: ModuleType) -> bool:
    return isinstance(it, type) and issubclass(it, module.BasePress)


def said(error: BaseException) -> str:
    """Return the first line of another library's error, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
