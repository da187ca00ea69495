"""Examples as JSON lines: the form in which `kvscope trace` reads prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvscope.core.json import JsonDict
from kvscope.tasks.base import Example


def as_object(example: Example) -> JsonDict:
    """Return an example as the object of its line."""
    found: JsonDict = {
        "id": example.id,
        "task": example.task,
        "prompt": example.prompt,
        "answers": list(example.answers),
        "metric": example.metric,
        "length": example.length,
        "depth": None if example.depth is None else round(example.depth, 4),
        "spans": [{"name": span.name, "start": span.start, "stop": span.stop} for span in example.spans],
    }
    return {name: value for name, value in found.items() if value is not None}


def as_lines(examples: Iterable[Example]) -> str:
    """Return examples as JSON lines; the same examples give the same bytes."""
    return "".join(json.dumps(as_object(example), ensure_ascii=False) + "\n" for example in examples)
