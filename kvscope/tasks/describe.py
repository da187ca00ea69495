"""Descriptions of task families, for listings."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import TypedDict

from kvscope.tasks.base import TASKS, Family


class TaskParameter(TypedDict):
    """A parameter of a family."""

    name: str
    default: object
    help: str


class TaskDescription(TypedDict):
    """A family; `text` is its documentation, `summary` the first sentence of it."""

    name: str
    summary: str
    text: str
    metric: str
    paper: str
    parameters: list[TaskParameter]


def describe() -> list[TaskDescription]:
    """Return the description of every family."""
    return [describe_one(cls) for _, cls in TASKS.items()]


def describe_one(cls: type[Family]) -> TaskDescription:
    """Return the description of one family."""
    text = inspect.getdoc(cls) or ""
    return {
        "name": cls.name,
        "summary": " ".join(text.partition("\n\n")[0].split()),
        "text": text,
        "metric": cls.metric,
        "paper": cls.paper,
        "parameters": [
            {"name": item.name, "default": item.default, "help": str(item.metadata["help"])} for item in fields(cls)
        ],
    }
