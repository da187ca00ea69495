"""Which publications the policies of a command or of a replay are from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from kvscope.policies.base import POLICIES, Policy
from kvscope.policies.citation import Citation
from kvscope.policies.parameters import rules_of
from kvscope.policies.press import Press

_NAME = re.compile(r"[\w-]+(?=\(|$)")  # of a label: ``a2sf(alpha=0.7)``


class Source(NamedTuple):
    """One policy that is used, and what to cite for it.

    Attributes
    ----------
    policy : str
        Its name.
    citation : Citation or None
        Its publication, if it has one.
    known : bool
        Whether the policy is installed; one of a user's file is not, unless the file was read.
    """

    policy: str
    citation: Citation | None
    known: bool = True


def cited_by_all() -> list[Source]:
    """Return every installed policy with its publication."""
    return [Source(name, cls.citation) for name, cls in POLICIES.items()]


def cited_by(policies: Iterable[Policy]) -> list[Source]:
    """Return the publications of policies with their parameters, as `cited_in` does for recorded ones."""
    found: list[Source] = []
    for policy in policies:
        first, *others = cited_in(policy.name, policy.label, policy.parameters(), policy.traits.allocate)
        found += [first if first.known else Source(policy.name, policy.citation), *others]
    return list(dict.fromkeys(found))


def cited_in(name: str, label: str, params: Mapping[str, object], allocate: str) -> list[Source]:
    """Return what a recorded run uses: its policy, those that it is made of, and the rule of its allocation.

    Nothing is run to find it: a base in a user's file is named and not known.

    Parameters
    ----------
    name : str
        Name of the policy; ``tuned`` for a result of ``kvscope tune``, whose label begins with the name.
    label : str
        Policy with its parameters.
    params : mapping of str to object
        Its parameters, as recorded.
    allocate : str
        How the budget was allocated: the publication of ``ada`` is that of the policy ``ada-kv``.
    """
    own = _named(label) if name == "tuned" else name
    settings = params.get("settings")
    several = settings if name == "tuned" and isinstance(settings, list) else [params]
    found = [source for one in several if isinstance(one, Mapping) for source in _of_policy(own, one)]
    classes = dict(POLICIES.items())
    if allocate != "uniform" and (own not in classes or classes[own].allocate != allocate):
        rules = [Source(other, cls.citation) for other, cls in classes.items() if cls.allocate == allocate]
        found += rules or [Source(f"allocation {allocate}", None, known=False)]
    return list(dict.fromkeys(found))


def _of_policy(name: str, params: Mapping[str, object]) -> Iterator[Source]:
    cls = Press if name == Press.name else dict(POLICIES.items()).get(name)
    if cls is None:
        yield Source(name, None, known=False)
        return
    rule = rules_of(cls).get(str(params.get("variant", "")), cls)
    yield Source(name, rule.citation)
    for part in ("base", *cls.positional):
        member = params.get(part)
        if isinstance(member, str):
            yield from _of_policy(_named(member), _settings(member))


def _settings(label: str) -> dict[str, str]:
    """Return the settings in a label, ``{"base": "h2o"}`` of ``vatp(base=h2o)``; nothing is looked up or checked."""
    inside = label.partition("(")[2].removesuffix(")")
    found, depth, start = {}, 0, 0
    for index, sign in enumerate(inside + ","):
        depth += (sign == "(") - (sign == ")")
        if sign == "," and not depth:
            name, _, value = inside[start:index].partition("=")
            found[name.strip()] = value.strip()
            start = index + 1
    return found


def _named(label: str) -> str:
    """Return the name that a label begins with; all of it where it is the path of a file."""
    named = _NAME.match(label)
    return named[0] if named else label
