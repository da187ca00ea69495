"""Descriptions of the policies as plain data, for ``kvscope policies`` and the documentation."""

from __future__ import annotations

import inspect
from dataclasses import MISSING
from typing import TypedDict

from kvscope.policies.base import POLICIES, Policy, Traits
from kvscope.policies.parameters import all_parameters_of, default_of, parameters_of, rules_of, type_name


class ParameterDescription(TypedDict):
    """One parameter: its type in readable form, its default, and a line of help."""

    name: str
    type: str
    default: object
    help: str


class PolicyDescription(TypedDict):
    """One policy. The entries from ``needs`` on are its traits with the default parameters; see `Policy`."""

    name: str
    summary: str
    doc: str
    formula: str
    parameters: list[ParameterDescription]
    paper: str
    proven: str
    variants: list[str]
    needs: list[str]
    scope: str
    phase: str
    bounded: bool
    reads: bool
    clairvoyant: bool
    allocate: str
    prefills: list[str]
    published: bool


def describe(name: str | None = None) -> list[PolicyDescription]:
    """Return the descriptions of all policies, or of one, as plain data.

    Each is a dict with the rule (``summary``, ``doc``, ``formula``), the ``parameters`` with defaults and help, the
    source (``paper``), what decisions were compared with (``proven``), and the traits with the default parameters.
    ``variants`` lists the choices of the parameter ``variant``, if there is one; ``doc`` and ``proven`` include those
    of each variant.

    Parameters
    ----------
    name : str, optional
        Name of a policy; by default all are described.

    Raises
    ------
    UsageError
        If there is no policy of that name.

    Example
    -------
    >>> import kvscope
    >>> (tova,) = kvscope.policies("tova")
    >>> tova["scope"], tova["phase"], tova["paper"]
    ('layer', 'step', 'arXiv:2401.06104 section 4.2')
    """
    classes = [POLICIES.get(name)] if name else [cls for _, cls in POLICIES.items()]
    return [_description(cls) for cls in classes]


def _description(cls: type[Policy]) -> PolicyDescription:
    rules, doc, traits = rules_of(cls), inspect.getdoc(cls) or "", _traits(cls)
    others = {name: other for name, other in rules.items() if other is not cls}
    return {
        "name": cls.name,
        "summary": doc.split("\n", 1)[0],
        "doc": "\n\n".join([doc, *(f"``variant={name}``: {inspect.getdoc(rule)}" for name, rule in others.items())]),
        "formula": cls.formula,
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
        "needs": sorted(traits.needs),
        "scope": traits.scope,
        "phase": traits.phase,
        "bounded": traits.bounded,
        "reads": traits.reads,
        "clairvoyant": traits.clairvoyant,
        "allocate": traits.allocate,
        "prefills": sorted(traits.prefills),
        "published": traits.published,
    }


def _traits(cls: type[Policy]) -> Traits | type[Policy]:
    """Return the traits with the default parameters; those of the class where a parameter has no default."""
    complete = all(default_of(field) is not MISSING for field, _ in parameters_of(cls).values())
    return cls().traits if complete else cls
