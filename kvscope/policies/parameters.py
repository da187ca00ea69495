"""The parameters of a policy and its variants, which are the fields of their classes, with their types."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from kvscope.core.errors import UsageError
from kvscope.policies.base import POLICIES, VARIANTS, Policy

# The types of a class's attributes by name: they are compiled from text, which takes a millisecond.
_types_of: Callable[..., Mapping[str, object]] = cache(get_type_hints)


class Parameter(NamedTuple):
    """One parameter of a policy: the field of the class, and its type."""

    field: Field[Any]
    kind: object


def rules_of(cls: type[Policy]) -> dict[str, type[Policy]]:
    """Return the classes of a policy by the name of the variant, the plain rule first.

    A class that is not registered, since it is from a user's file, is returned alone.
    """
    registered = dict(POLICIES.items()).get(cls.name, cls)
    rules = [registered, *(other for _, other in VARIANTS.items() if other.name == cls.name)]
    return {_variant_name(rule): rule for rule in (rules if cls in rules else [cls])}


def _variant_name(cls: type[Policy]) -> str:
    return str(getattr(cls, "variant", "plain"))


def rule_of(cls: type[Policy], settings: Mapping[str, str]) -> type[Policy]:
    """Return the class of the variant that the settings select, or `cls` if they select none."""
    rules = rules_of(cls)
    name = settings.get("variant")
    if name is None or len(rules) == 1:
        return cls
    if name not in rules:
        raise not_of_type(cls.name, "variant", name, Literal[tuple(rules)])
    return rules[name]


def parameters_of(cls: type[Policy]) -> dict[str, Parameter]:
    """Return the parameters of one class, by name: field and type."""
    hints = _types_of(cls)
    known = {field.name: Parameter(field, hints[field.name]) for field in fields(cls)}
    if "variant" in known and not known["variant"].field.init:
        known["variant"] = Parameter(known["variant"].field, Literal[tuple(rules_of(cls))])
    return known


def all_parameters_of(cls: type[Policy]) -> dict[str, Parameter]:
    """Return the parameters of a policy and its variants."""
    found: dict[str, Parameter] = {}
    for rule in rules_of(cls).values():
        found = parameters_of(rule) | found
    return found


def default_of(field: Field[Any]) -> object:
    """Return the default of a parameter, or `dataclasses.MISSING`."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def not_of_type(policy: str, name: str, text: str, kind: object) -> UsageError:
    """Return the error for text that is not a value of a parameter's type."""
    return UsageError(f"{policy}: {name}={text!r} is not {type_name(kind)}", f"See: kvscope policies {policy}")


def type_name(kind: object) -> str:
    """Return a type in readable form: ``int``, ``mean | max | sum``."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in get_args(kind))
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))
