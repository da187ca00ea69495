"""From a paper to experiments that run, and from their cells to what became of its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvscope.core.budget import Budget
from kvscope.core.claim_records import REPRODUCTION, Claim, Reproduction, Setting
from kvscope.core.errors import UsageError
from kvscope.core.output import replace_file
from kvscope.core.version import __version__
from kvscope.experiments.cells import Done
from kvscope.experiments.experiment import Experiment
from kvscope.experiments.paper import GATE, Paper, Part, packaged
from kvscope.experiments.plan import ExperimentPlan
from kvscope.experiments.spec import experiment_of
from kvscope.model.names import DEMO, resolve
from kvscope.policies.spec import parse_policy
from kvscope.results.claims import Results, all_values, evaluate


@dataclass(frozen=True)
class Choices:
    """What the user chooses.

    Attributes
    ----------
    model : str
        Model to run: ``demo``, an alias, a Hub id or a folder.
    prompts : tuple of str
        Files of prompts in place of the paper's datasets.
    gate : str or None
        File of a gate that was trained for the model.
    """

    model: str = DEMO
    prompts: tuple[str, ...] = ()
    gate: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A paper, ready to run.

    Attributes
    ----------
    paper : Paper
        The paper.
    model : str
        The model that runs.
    experiments : mapping of str to Experiment
        Of each part that can run, its experiment, named ``NAME-PART``.
    missing : mapping of str to str
        Parts that cannot run, and why.
    claims : tuple of Claim
        The claims, with policies and budgets as in results.
    """

    paper: Paper
    model: str
    experiments: Mapping[str, Experiment]
    missing: Mapping[str, str]
    claims: tuple[Claim, ...]


def prepare(paper: Paper, choices: Choices, output: str) -> Prepared:
    """Return the experiments of a paper for a model.

    Parameters
    ----------
    paper : Paper
        The paper.
    choices : Choices
        What the user chooses.
    output : str
        Beginning of the names of the experiments.

    Raises
    ------
    UsageError
        If nothing can run without texts that are not given, texts or a gate are given that no part takes, or the model
        needs a gate.
    """
    _require_fitting(paper, choices)
    found: dict[str, Experiment] = {}
    missing: dict[str, str] = {}
    for name, part in paper.parts.items():
        if part.texts is not None and not choices.prompts and choices.model != DEMO:
            missing[name] = f"it needs --prompts: {part.texts}"
            continue
        found[name] = experiment_of(_keys(part, choices), f"the paper {paper.name}", f"{output}-{name}")
    if not found:
        (what, *_) = [part.texts for part in paper.parts.values() if part.texts is not None]
        raise UsageError(f"the texts of the paper {paper.name} do not come with kvscope", f"Give --prompts: {what}")
    claims = tuple(_spelled(claim, choices.gate) for claim in paper.claims)
    return Prepared(paper, choices.model, found, missing, claims)


def _require_fitting(paper: Paper, choices: Choices) -> None:
    if choices.prompts and all(part.texts is None for part in paper.parts.values()):
        raise UsageError(f"the paper {paper.name} takes no prompts", "Omit --prompts: its tasks are made here.")
    if choices.gate is not None and not paper.gated:
        raise UsageError(f"the paper {paper.name} needs no gate", "Omit --gate.")
    if choices.gate is None and paper.gated and choices.model != DEMO:
        raise UsageError(
            f"{choices.model} has no gate that comes with kvscope",
            f"Train one: kvscope gate train --model {choices.model} --text FILE. Then give it: --gate FILE",
        )


def _keys(part: Part, choices: Choices) -> dict[str, object]:
    """Return the keys of the experiment of a part."""
    keys: dict[str, object] = {"model": choices.model, **part.settings}
    if choices.model == DEMO:
        keys |= part.bundled
        if keys.get("prompts"):
            keys["prompts"] = str(packaged(str(keys["prompts"])))
    if choices.prompts and part.texts is not None:
        keys |= {"prompts": list(choices.prompts), "tasks": None, "lengths": None}
    if choices.gate is not None:
        given = keys["policies"]
        assert isinstance(given, list), "policies are a list"
        keys |= {"policies": [_with_gate(one, choices.gate) for one in given], "hidden": True}
    return {name: value for name, value in keys.items() if value is not None}


def _with_gate(policy: object, gate: str | None) -> object:
    return f"{GATE}:gate={gate}" if policy == GATE and gate is not None else policy


def _spelled(claim: Claim, gate: str | None) -> Claim:
    """Return a claim with policies and budgets as in results."""
    return replace(claim, better=_setting(claim.better, gate), worse=_setting(claim.worse, gate))


def _setting(setting: Setting, gate: str | None) -> Setting:
    budget = None if setting.budget is None else str(Budget.parse(setting.budget))
    return Setting(policy=parse_policy(str(_with_gate(setting.policy, gate))).label, budget=budget)


def reproduction(prepared: Prepared, plans: Mapping[str, ExperimentPlan]) -> Reproduction:
    """Return what became of the claims of a paper, from everything of its plans that is done."""
    paper = prepared.paper
    results = {part: Results(plan.results(Done(plan.store))) for part, plan in plans.items()}
    return Reproduction(
        name=paper.name,
        title=paper.title,
        source=paper.source,
        model=prepared.model,
        paper_model=paper.model,
        notes=tuple(notes_of(prepared)),
        versions={"kvscope": __version__},
        summaries={part: plan.experiment.name for part, plan in plans.items()},
        findings=evaluate(prepared.claims, results, prepared.missing),
        values=tuple(all_values(prepared.claims, results)),
    )


def notes_of(prepared: Prepared) -> Sequence[str]:
    """Return how an experiment differs from the paper's."""
    paper = prepared.paper
    notes = list(paper.notes)
    if resolve(prepared.model) != resolve(paper.model):
        notes.insert(0, f"The model is {prepared.model}, not the paper's ({paper.model}).")
    return [*notes, *paper.bundled] if prepared.model == DEMO else notes


def write_reproduction(record: Reproduction, file: Path) -> None:
    """Write a reproduction in place of an older one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, REPRODUCTION.text(record).encode())
