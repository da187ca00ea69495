"""From the words of a command line to a task family."""

from __future__ import annotations

from dataclasses import fields

from kvscope.core.errors import UsageError
from kvscope.core.registry import nearest
from kvscope.tasks.base import TASKS, Family


def parse_task(spec: str) -> Family:
    """Return the family that ``needle-multikey:distractors=7,wording=notes`` names.

    Raises
    ------
    UsageError
        For an unknown family or parameter, or a value of the wrong type or out of range.
    """
    name, colon, rest = spec.partition(":")
    cls = TASKS.get(name.strip())
    known = {item.name: item for item in fields(cls)}
    values: dict[str, object] = {}
    for part in rest.split(",") if colon else []:
        key, equals, text = (one.strip() for one in part.partition("="))
        if not equals or not key or not text:
            raise UsageError(f"{part!r} in {spec!r} is not a setting", f"Write name=value: {cls.name}:NAME=VALUE")
        if key in values:
            raise UsageError(f"{key} is set twice in {spec!r}", "Set each parameter once.")
        if key not in known:
            own = nearest(key, known) if known else f"{cls.name} has no parameters."
            raise UsageError(f"task {cls.name} has no parameter {key!r}", own)
        values[key] = _converted(cls.name, key, text, type(known[key].default))
    return cls(**values)


def _converted(task: str, name: str, text: str, kind: type) -> object:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{task}: {name}={text!r} is not {kind.__name__}", f"See: kvscope tasks show {task}") from None
