"""Named things that a user can add to: policies, metrics, panels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from kvscope.core.errors import UsageError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a line that suggests the names nearest to `name`, or lists them all."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(known)}."


class Registry(Generic[T]):
    """Classes or functions by name, from the package and from installed entry points.

    Parameters
    ----------
    kind : str
        What it holds, for messages: ``policy``.
    group : str
        Entry-point group that other packages use: ``kvscope.policies``.
    package : str, optional
        Module, or package of modules, whose import registers the built-in members: imported at the first look-up, so
        that a new member is one new file.

    Attributes
    ----------
    broken : dict of str to str
        Installed entry points that failed to load, by name, and why: left out, and named where they are missed.
    """

    def __init__(self, kind: str, group: str, package: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self.package = package
        self._members: dict[str, T] = {}
        self._discovered = False
        self.broken: dict[str, str] = {}

    def register(self, name: str, member: T) -> T:
        """Return `member`, now known as `name`.

        Raises
        ------
        UsageError
            If another member has that name.
        """
        present = self._members.get(name)
        if present is not None and not _same_source(present, member):
            raise UsageError(
                f"{self.kind} {name!r} is registered twice: {_where(present)} and {_where(member)}",
                "Give one of them another name.",
            )
        self._members[name] = member
        return member

    def get(self, name: str) -> T:
        """Return the member called `name`.

        Raises
        ------
        UsageError
            If there is none; the message suggests the nearest names.
        """
        self._discover()
        try:
            return self._members[name]
        except KeyError:
            if name in self.broken:
                raise UsageError(
                    f"{self.kind} {name!r} is installed and broken: {self.broken[name]}",
                    "Mend or remove the package that brings it.",
                ) from None
            raise UsageError(f"no {self.kind} is called {name!r}", nearest(name, self._members)) from None

    def names(self) -> list[str]:
        """Return every name, in the order of registration."""
        self._discover()
        return list(self._members)

    def items(self) -> list[tuple[str, T]]:
        """Return every name and member, in the order of registration."""
        self._discover()
        return list(self._members.items())

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        if self.package is not None:
            _import_all(self.package)
        for point in entry_points(group=self.group):
            load: Callable[[], Any] = point.load
            try:
                load()  # importing the module runs its decorator
            except Exception as error:  # whatever somebody else's module raises must not stop all commands
                where = f" (package {point.dist.name})" if point.dist is not None else ""
                self.broken[point.name] = f"{type(error).__name__}: {error}{where}"


def _import_all(name: str) -> None:
    """Import a module, and if it is a package every module in it, by name."""
    module = import_module(name)
    for found in iter_modules(getattr(module, "__path__", [])):
        import_module(f"{name}.{found.name}")


def _same_source(one: object, other: object) -> bool:
    """Return whether both are the same definition, imported once more (a file given twice)."""
    return _where(one) == _where(other)


def _where(member: object) -> str:
    code = getattr(member, "__code__", None)
    file = getattr(code, "co_filename", None) or getattr(member, "__module__", "?")
    return f"{file}:{getattr(member, '__qualname__', member)}"
