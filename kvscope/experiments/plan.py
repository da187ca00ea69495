"""Plan an experiment: which cells it has, which of them are done, and what the others take."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvscope.core.budget import parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.experiment_records import CellRecord, CellRun
from kvscope.core.options import PlanOptions, Prefill
from kvscope.experiments.cells import SHORT, Done, Store, TraceCell, digest, readable, run_key, trace_cells
from kvscope.experiments.experiment import SIXTEEN_BIT, Experiment
from kvscope.experiments.spec import policy_specs
from kvscope.model.prompt_files import read_prompts
from kvscope.policies.spec import parse_policy


@dataclass(frozen=True)
class RunRequest:
    """One policy under one budget.

    Attributes
    ----------
    spec : str
        The policy, as the experiment names it.
    label : str
        The policy, as tables name it.
    budget : str or None
        None for a policy that holds to none.
    key : str
        SHA-256 of all that the run depends on.
    optional : bool
        Whether it comes from ``all``: if it cannot run it is skipped.
    cache, merge : str or None
        How its cache is quantised, and how what it evicts is merged; None is what a policy runs with by default.
    """

    spec: str
    label: str
    budget: str | None
    key: str
    optional: bool
    cache: str | None = None
    merge: str | None = None

    def options(self, experiment: Experiment) -> PlanOptions:
        """Return the options of the experiment, with the cache and the merging rule of this run."""
        caches, merges = ((each,) if each else () for each in (self.cache, self.merge))
        return replace(experiment.plan, caches=caches, merges=merges)


@dataclass(frozen=True)
class TraceUnit:
    """A trace to record."""

    experiment: Experiment
    cell: TraceCell
    device: str

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"trace of {self.cell.title}"


@dataclass(frozen=True)
class ReplayUnit:
    """Runs to make over one trace.

    Attributes
    ----------
    experiment : Experiment
        What they belong to.
    cell : TraceCell
        Their trace, which must be there when the unit runs.
    prefill : Prefill
        What happens during the prompt.
    requests : tuple of RunRequest
        The runs.
    store : Store
        Where results go.
    device : str
        Where to compute.
    """

    experiment: Experiment
    cell: TraceCell
    prefill: Prefill
    requests: tuple[RunRequest, ...]
    store: Store
    device: str

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"replay of {self.cell.title}, {self.prefill} prefill"

    def path(self, requests: Sequence[RunRequest]) -> Path:
        """Return the folder of the replay of some of the requests."""
        keys: list[str] = sorted(one.key for one in requests)
        address = digest({"runs": list(keys), "steps": list(self.experiment.loop_steps)})
        name = readable(self.cell.path.name[: -SHORT - 1])
        return self.store.replays / f"{name}-{self.prefill}-{address[:SHORT]}"


Unit = TraceUnit | ReplayUnit


@dataclass(frozen=True)
class ExperimentPlan:
    """The cells of an experiment.

    Attributes
    ----------
    experiment : Experiment
        The experiment.
    store : Store
        Where its cells are.
    cells : tuple of TraceCell
        Every trace.
    requests : dict of (TraceCell, Prefill) to tuple of RunRequest
        Every run.
    device : str
        Where to compute.
    """

    experiment: Experiment
    store: Store
    cells: tuple[TraceCell, ...]
    requests: dict[tuple[TraceCell, Prefill], tuple[RunRequest, ...]]
    device: str

    def traces(self) -> list[TraceUnit]:
        """Return the traces that are to be recorded."""
        return [TraceUnit(self.experiment, cell, self.device) for cell in self.cells if not cell.done]

    def replays(self, done: Done) -> list[ReplayUnit]:
        """Return the replays that are to be made."""
        found = []
        for (cell, prefill), requests in self.requests.items():
            missing = tuple(one for one in requests if done.find(one.key, self.experiment.loop_steps) is None)
            if missing:
                found.append(ReplayUnit(self.experiment, cell, prefill, missing, self.store, self.device))
        return found

    def results(self, done: Done) -> Iterator[tuple[CellRecord, CellRun]]:
        """Yield every run that is done, in the order of the experiment."""
        for requests in self.requests.values():
            for one in requests:
                found = done.find(one.key, self.experiment.loop_steps)
                if found is not None:
                    yield found


def make_plan(experiment: Experiment, store: Store, device: str) -> ExperimentPlan:
    """Return the plan of an experiment; nothing is written.

    Raises
    ------
    UsageError
        If a model, a policy or a file is not found, or two runs are the same; if prompts cannot be read, or answers are
        to be generated and a file has none.
    """
    _require_files(experiment)
    cells = tuple(trace_cells(experiment, store))
    if len({cell.path for cell in cells}) < len(cells):
        raise UsageError(f"{experiment.name} names a model, task, length or file twice", "Name each once.")
    requests = {
        (cell, prefill): tuple(_requests(experiment, cell, prefill))
        for cell in cells
        for prefill in (dict.fromkeys(experiment.prefill) if experiment.replays else ())
    }
    return ExperimentPlan(experiment, store, cells, requests, device)


def _require_files(experiment: Experiment) -> None:
    """Raise UsageError if a file is missing, is not of prompts, or has no right answers where they are needed."""
    for file in (*experiment.prompts, *(() if experiment.haystack is None else (experiment.haystack,))):
        if not os.access(file, os.R_OK):
            raise UsageError(f"{experiment.name}: cannot read {file}", "Paths are relative to the current folder.")
    for file in experiment.prompts:
        prompts = read_prompts([Path(file)], None, experiment.field, experiment.template)
        if "generate" in experiment.steps and not any(prompt.answers for prompt in prompts):
            raise UsageError(
                f"{file} has no right answers, so answers under a policy cannot be scored",
                "Add answers to its objects, or write steps: [trace, replay, closed-loop, report]",
            )


def _requests(experiment: Experiment, cell: TraceCell, prefill: Prefill) -> Iterator[RunRequest]:
    """Yield the runs of a trace: each policy under each budget with each cache and merging rule.

    A policy that holds to no budget has one run with each cache and rule.
    """
    for spec, optional in policy_specs(experiment.policies):
        policy = parse_policy(spec)
        budgets = [str(budget) for budget in parse_budgets(experiment.budgets)] if policy.traits.bounded else [None]
        for cache, merge in experiment.variants(policy.traits):
            label = " + ".join([policy.label, *(each for each in (cache, merge) if each not in (None, SIXTEEN_BIT))])
            for budget in budgets:
                one = RunRequest(spec, label, budget, "", optional, cache, merge)
                key = run_key(experiment, cell, prefill, policy, budget, one.options(experiment))
                yield replace(one, key=key)
