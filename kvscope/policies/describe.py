"""What there is to know about each policy, as plain data: for ``kvscope policies`` and the documentation."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from kvscope.policies.base import POLICIES, Policy, Traits
from kvscope.policies.parameters import all_parameters_of, default_of, parameters_of, rules_of, type_name


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Return what there is to know about one policy or all.

    Each row has ``name``, ``summary``, ``doc``, ``parameters``, ``paper``, ``proven``, every trait of the policy with
    its default parameters (``needs``, ``scope``, ``phase``, ``bounded``, ``reads``, ``clairvoyant``, ``allocate``,
    ``prefills``, ``published``), and ``variants``: the choices of its parameter ``variant``, if it has one.
    """
    classes = [POLICIES.get(name)] if name else [cls for _, cls in POLICIES.items()]
    return [_description(cls) for cls in classes]


def _description(cls: type[Policy]) -> dict[str, Any]:
    rules = rules_of(cls)
    doc = inspect.getdoc(cls) or ""
    others = {name: other for name, other in rules.items() if other is not cls}
    return {
        "name": cls.name,
        "summary": doc.split("\n", 1)[0],
        "doc": "\n\n".join(
            [doc, *(f"``variant={name}``: {inspect.getdoc(other) or ''}" for name, other in others.items())]
        ),
        "parameters": [
            {
                "name": field.name,
                "type": type_name(kind),
                "default": default_of(field),
                "help": str(field.metadata.get("help", "")),
            }
            for field, kind in all_parameters_of(cls).values()
        ],
        "paper": cls.paper,
        "proven": "; ".join([cls.proven, *(f"{name}: {other.proven}" for name, other in others.items())]),
        "variants": list(rules) if others else [],
        **_traits(cls),
    }


def _traits(cls: type[Policy]) -> dict[str, Any]:
    """Return the traits with the default parameters; those of the class where a parameter has no default."""
    complete = all(default_of(field) is not MISSING for field, _ in parameters_of(cls).values())
    source = cls().traits if complete else cls
    traits = {item.name: getattr(source, item.name) for item in fields(Traits)}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in traits.items()}
