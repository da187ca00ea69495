"""A template that makes a prompt of the fields of an object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from kvscope.core.errors import UsageError
from kvscope.core.json import JsonDict
from kvscope.core.registry import nearest

_EXAMPLE = "Write {NAME} for a field, and {{ or }} for a brace: --template '{context} Question: {input}'"


@dataclass(frozen=True)
class PromptTemplate:
    """A template: its text, and its parts in order, each a text and the name of the field after it, or None."""

    text: str
    parts: Sequence[tuple[str, str | None]]

    @classmethod
    def of(cls, text: str | None) -> PromptTemplate | None:
        """Return the template of a text in which ``{name}`` is a field; None of None.

        Raises
        ------
        UsageError
            If a brace is not closed, a name has more than letters, digits, ``_`` and ``-``, or no field is named.
        """
        if text is None:
            return None
        try:
            parts = [(before, name, form or change) for before, name, form, change in Formatter().parse(text)]
        except ValueError as error:
            raise UsageError(f"--template: {error}", _EXAMPLE) from None
        for _, name, other in parts:
            if name is not None and (other or not name.replace("-", "_").isidentifier()):
                raise UsageError(f"--template: {name!r} is not the name of a field", _EXAMPLE)
        if all(name is None for _, name, _ in parts):
            raise UsageError("--template has no field in it", _EXAMPLE)
        return cls(text, [(before, name) for before, name, _ in parts])

    def filled(self, place: str, entry: JsonDict) -> str:
        """Return the prompt of an object; a value that is not a text is written as JSON.

        Raises
        ------
        UsageError
            If the object has not a field of the template, or has spans, which are places in another text.
        """
        if "spans" in entry:
            raise UsageError(f"{place}: its spans do not refer to the prompt that --template makes", "Omit either.")
        made = []
        for before, name in self.parts:
            made.append(before)
            if name is None:
                continue
            if name not in entry:
                raise UsageError(f"{place}: no field {name}, which the template has", nearest(name, entry))
            value = entry[name]
            made.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(made)
