"""Registries of named members that users can extend: policies, metrics, panels, allocations, commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from kvscope.core.errors import UsageError
from kvscope.core.own_code import note_module

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a line that suggests the names nearest to `name`, or lists them all."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(known)}."


class Registry(Generic[T]):
    """Classes, functions or records by name, from the package and from installed entry points.

    The names are listed by the module that defines them: first the built-in ones in the alphabetical order of their
    modules, then those of other packages and files, in the order of registration. Those of one module
    are in the order of its lines. A class comes before the classes derived from it. The order of imports makes no
    difference.

    Parameters
    ----------
    kind : str
        Kind of its members, for messages: ``policy``.
    group : str, optional
        Entry-point group that other packages use: ``kvscope.policies``. Without one they cannot add to it.
    package : str, optional
        Module, or package of modules, whose import registers the built-in members: imported at the first look-up, so
        that a new member is one new file.

    Attributes
    ----------
    broken : dict of str to str
        Installed entry points that failed to load, by name, with the reason; requesting one is an error.
    """

    def __init__(self, kind: str, group: str | None = None, package: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self.package = package
        self._members: dict[str, T] = {}
        self._sources: dict[str, object] = {}
        self._names: list[str] | None = None  # in order; None after a change
        self._discovered = False
        self.broken: dict[str, str] = {}

    def register(self, name: str, member: T, source: object = None) -> T:
        """Return `member`, now known as `name`.

        Parameters
        ----------
        name : str
            What users call it.
        member : object
            What `get` returns.
        source : function or class, optional
            What defines the member, if it is a record made from a function.

        Raises
        ------
        UsageError
            If another member has that name.
        """
        definition = member if source is None else source
        present = self._sources.get(name)
        if present is not None and _where(present) != _where(definition):
            raise UsageError(
                f"{self.kind} {name!r} is registered twice: {_where(present)} and {_where(definition)}",
                "Give one of them another name.",
            )
        self._members[name] = member
        self._sources[name] = definition
        self._names = None
        note_module(str(getattr(definition, "__module__", "")), self.kind)
        return member

    def remove(self, name: str) -> None:
        """Forget the member called `name`: for tests and notebooks that define one for a while."""
        del self._members[name], self._sources[name]
        self._names = None

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
                    f"{self.kind} {name!r} is installed but cannot be loaded: {self.broken[name]}",
                    "Fix or uninstall the package that provides it.",
                ) from None
            raise UsageError(f"no {self.kind} is called {name!r}", nearest(name, self._members)) from None

    def names(self) -> list[str]:
        """Return every name, in the order that the class describes."""
        self._discover()
        if self._names is None:
            self._names = self._ordered()
        return list(self._names)

    def items(self) -> list[tuple[str, T]]:
        """Return every name and member, in the order that the class describes."""
        return [(name, self._members[name]) for name in self.names()]

    def _ordered(self) -> list[str]:
        names = {id(source): name for name, source in self._sources.items()}
        ordered: dict[str, None] = {}
        for name in sorted(self._members, key=self._module):  # stable: a module registers in the order of its lines
            source = self._sources[name]
            for base in reversed(getattr(source, "__mro__", (source,))):  # the last is the class itself
                if id(base) in names:
                    ordered.setdefault(names[id(base)])
        return list(ordered)

    def _module(self, name: str) -> tuple[bool, str]:
        """Return the sort key of a member: built-in ones by module, then the others in the order of registration."""
        module = str(getattr(self._sources[name], "__module__", ""))
        built_in = self.package is not None and f"{module}.".startswith(f"{self.package}.")
        return (False, module) if built_in else (True, "")

    def _discover(self) -> None:
        if self._discovered:
            return
        if self.package is not None:
            _import_all(self.package)
        self._discovered = True
        if self.group is not None:
            self._load_entry_points(self.group)

    def _load_entry_points(self, group: str) -> None:
        from importlib.metadata import entry_points  # slow to import, and not needed for the help

        for point in entry_points(group=group):
            load: Callable[[], object] = point.load
            try:
                load()  # importing the module runs its decorator
            except Exception as error:  # an error in another package must not stop all commands
                where = f" (package {point.dist.name})" if point.dist is not None else ""
                self.broken[point.name] = f"{type(error).__name__}: {error}{where}"


def _import_all(name: str) -> None:
    """Import a module, and if it is a package every module in it, in alphabetical order."""
    module = import_module(name)
    for found in sorted(item.name for item in iter_modules(getattr(module, "__path__", []))):
        import_module(f"{name}.{found}")


def _where(member: object) -> str:
    code = getattr(member, "__code__", None)
    file = getattr(code, "co_filename", None) or getattr(member, "__module__", "?")
    return f"{file}:{getattr(member, '__qualname__', member)}"
