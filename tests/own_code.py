"""Forget code that users brought, so that the next command or test finds kvscope without it."""

from __future__ import annotations

import sys
from typing import Any

from kvscope.core.own_code import USER_FILE
from kvscope.core.registry import Registry

OF_PROJECT = ("kvscope", "kvscope_example", "tests")  # packages whose members every test may expect


def forget_modules() -> bool:
    """Forget modules made of user files, as each command of a real shell does; return whether there were any."""
    if USER_FILE not in "\n".join(sys.modules):  # in one search: this is called after every test
        return False
    names = [name for name in sys.modules if name.startswith(USER_FILE)]
    for name in names:
        del sys.modules[name]
    return bool(names)


def forget_members() -> None:
    """Remove from every registry what files of users and pasted code registered."""
    for registry in registries():
        for name, source in list(registry._sources.items()):
            if str(getattr(source, "__module__", "")).partition(".")[0] not in OF_PROJECT:
                registry.remove(name)


def registries() -> list[Registry[Any]]:
    """Return every registry of the modules of kvscope that are loaded."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("kvscope.")]
    found = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Registry)}
    return list(found.values())
