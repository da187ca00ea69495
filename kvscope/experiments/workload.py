"""How much work and space the cells of an experiment take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from kvscope.experiments.cells import TraceCell
from kvscope.experiments.experiment import Experiment
from kvscope.experiments.plan import ExperimentPlan, TraceUnit, Unit
from kvscope.model.model_facts import ModelFacts, model_facts
from kvscope.model.prompt_files import read_prompts
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.schema import STORES, TOP, parse_store
from kvscope.trace.space import estimate_layers

CHARACTERS = 4  # of a token, roughly, in files of prompts
PARTS = {"replay": 1.0, "closed-loop": 3.0, "generate": 3.0}  # what a step of a run costs beside a step of a trace


def lengths_of(experiment: Experiment, cell: TraceCell) -> list[int]:
    """Return the tokens of each sequence of a cell, at most; of files of prompts roughly."""
    texts = cell.texts
    if texts.length is not None:
        return [texts.length + experiment.max_new_tokens] * experiment.examples
    assert texts.file is not None, "either a task or a file"
    return [size // CHARACTERS + 1 + experiment.max_new_tokens for size in _sizes(experiment, texts.file)]


def weight(unit: Unit) -> float:
    """Return how much work a unit is, in steps of a trace: for the bar that shows how much is done."""
    tokens = sum(lengths_of(unit.experiment, unit.cell))
    if isinstance(unit, TraceUnit):
        return float(tokens)
    return tokens * (0.2 + 0.1 * len(unit.requests) * sum(PARTS[step] for step in unit.experiment.loop_steps))


def trace_bytes(plan: ExperimentPlan, cells: Sequence[TraceCell]) -> int:
    """Return the estimated bytes of traces, from the configurations of their models.

    Raises
    ------
    ModelError
        If the configuration of a model cannot be read.
    """
    facts = {model: model_facts(model.model) for model in dict.fromkeys(cell.model for cell in cells)}
    name, top = parse_store(plan.experiment.store)
    return sum(
        estimate_layers(
            _layers(facts[cell.model]),
            lengths=lengths_of(plan.experiment, cell),
            stored=STORES[name],
            top=top or TOP,
            number_bytes=2,
        )
        for cell in cells
    )


def _layers(facts: ModelFacts) -> list[LayerHeads]:
    same = LayerHeads(facts.heads, facts.kv_heads, facts.head_dim)
    return list(facts.layer_heads) or [same] * facts.attention_layers


def _sizes(experiment: Experiment, file: str) -> tuple[int, ...]:
    return _characters(file, experiment.field, experiment.template)


@lru_cache(maxsize=64)  # a file is asked for by every cell that it is part of
def _characters(file: str, field: str | None, template: str | None) -> tuple[int, ...]:
    return tuple(len(one.text) for one in read_prompts([Path(file)], None, field, template))
