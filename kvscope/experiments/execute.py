"""Make the cells of an experiment: record a trace, replay over it. Each works alone, wherever the store can be seen.

What fails is returned, with its reason, beside what was made: other cells do not depend on it.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvscope.closed_loop.trace_passages import load_model_of
from kvscope.core.budget import Budget
from kvscope.core.errors import KvscopeError
from kvscope.core.experiment_records import CELL, Failure
from kvscope.core.memory import is_out_of_memory, out_of_memory
from kvscope.core.options import ModelSource, OutputOptions, ReplayOptions
from kvscope.core.output import replace_file
from kvscope.core.own_code import own_place
from kvscope.core.progress import Progress, part_of
from kvscope.core.recording_options import StoreOptions, TextOptions
from kvscope.core.text_files import read_text
from kvscope.experiments.cell_record import cell_record
from kvscope.experiments.plan import ReplayUnit, RunRequest, TraceUnit, Unit
from kvscope.kernels.device import torch_device
from kvscope.model.compile import compile_recording
from kvscope.model.token_count import token_counter
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay, unsupported
from kvscope.replay.feasible import require_answers
from kvscope.tasks import make_examples, parse_task
from kvscope.tasks.dataset import as_lines
from kvscope.tasks.haystack import Haystack
from kvscope.tasks.make import Lengths
from kvscope.trace.reader import Trace, open_trace


@dataclass
class UnitResult:
    """What became of a unit, or of several.

    Attributes
    ----------
    failed : list of Failure
        What has no result.
    skipped : dict of str to str
        Policies of ``all`` that cannot run, and why.
    replays : list of str
        Names of the replays that were made.
    """

    failed: list[Failure] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    replays: list[str] = field(default_factory=list)

    def attempt(self, name: str, work: Callable[[], None]) -> bool:
        """Do some work and return whether it succeeded; what is wrong with the user's input or code becomes a failure.

        Raises
        ------
        KvscopeError, OSError
            If a disk is full: nothing else could be written either.
        Exception
            For a defect of kvscope.
        """
        try:
            work()
        except Exception as error:
            if _disk_is_full(error):
                raise
            explained = _explained(error)
            if explained is None:
                raise
            self.failed.append(Failure(name, explained.what, explained.todo))
            return False
        return True

    def add(self, other: UnitResult) -> None:
        """Take what became of another unit."""
        self.failed += other.failed
        self.skipped |= other.skipped
        self.replays += other.replays


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def _explained(error: Exception) -> KvscopeError | None:
    """Return what the user can do about an error; None for a defect of kvscope."""
    if isinstance(error, KvscopeError):
        return error
    if is_out_of_memory(error):
        exceeded = out_of_memory(error)
        return KvscopeError(exceeded.what, exceeded.todo)
    place = own_place(error.__traceback__)
    if place is None:
        return None
    return KvscopeError(f"your {place}: {type(error).__name__}: {error}", "Correct it, then run the experiment again.")


def run_unit(unit: Unit, progress_callback: Progress | None = None) -> UnitResult:
    """Make what a unit names, and return what failed. A trace that another process has recorded by now is left.

    Parameters
    ----------
    unit : TraceUnit or ReplayUnit
        What to make.
    progress_callback : callable, optional
        Called with the completed share, from 0 to 1.

    Raises
    ------
    KvscopeError, OSError, Exception
        As `UnitResult.attempt`.
    """
    result = UnitResult()
    if isinstance(unit, ReplayUnit):
        result.attempt(unit.title, lambda: _replay(unit, result, progress_callback))
    elif not unit.cell.done:
        result.attempt(unit.title, lambda: _record(unit, progress_callback))
    return result


def model_source(unit: Unit) -> ModelSource:
    """Return the model of a unit, and how it is loaded."""
    model = unit.cell.model
    return ModelSource(
        model.model,
        model.revision,
        model.dtype,
        unit.device,
        model.device_map,
        model.trust_remote_code,
        model.quantize,
    )


def _record(unit: TraceUnit, progress_callback: Progress | None) -> None:
    """Record the trace of a cell."""
    cell, experiment = unit.cell, unit.experiment
    given = cell.texts.file
    plan = compile_recording(
        model_source(unit),
        [_written(unit) if given is None else Path(given)],
        OutputOptions(cell.path),
        text=TextOptions(
            chat=experiment.chat,
            system=experiment.system,
            max_new_tokens=experiment.max_new_tokens,
            field=None if given is None else experiment.field,
            template=None if given is None else experiment.template,
        ),
        store=StoreOptions(experiment.store, hidden=experiment.hidden),
    )
    callback = progress_callback
    plan.execute(None if callback is None else lambda now: callback(now.done / max(plan.tokens, 1)))


def _written(unit: TraceUnit) -> Path:
    """Write the examples of a task beside the trace, each as long as the model's tokenizer counts; return the file."""
    texts, experiment = unit.cell.texts, unit.experiment
    assert texts.task is not None and texts.length is not None, "examples of a task"
    lengths = Lengths(texts.length, token_counter(model_source(unit)), "tokens")
    haystack = Haystack(None if experiment.haystack is None else read_text(Path(experiment.haystack)))
    examples = make_examples(parse_task(texts.task), lengths, experiment.examples, seed=texts.seed, haystack=haystack)
    lines = as_lines(examples).encode()
    file = unit.cell.path.with_name(f"{unit.cell.path.name}.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lines)
    return file


def _replay(unit: ReplayUnit, result: UnitResult, progress_callback: Progress | None) -> None:
    """Replay the runs of a unit: policies that can run at the same budgets in one pass.

    If such a pass fails, each of its policies is replayed alone, so that the others have a result.
    """
    trace = open_trace(unit.cell.path)
    options = unit.experiment.replay_options(unit.cell.model, unit.prefill, unit.device)
    if options.generate is not None:
        require_answers(trace, options)
    if options.closed is not None:
        load_model_of(trace, options.closed, str(torch_device(options.device)))  # what fails here, fails for all
    possible = _possible(trace, unit, options, result)
    groups = _groups(possible)
    for number, group in enumerate(groups):
        tried = UnitResult()
        callback = part_of(progress_callback, number, number + 1, len(groups))
        if tried.attempt(_name(unit, group), lambda: _pass(unit, trace, options, group, result, callback)):  # noqa: B023
            continue
        specs = list(dict.fromkeys(one.spec for one in group))
        if len(specs) == 1:
            result.add(tried)
        for spec in specs if len(specs) > 1 else ():
            alone = [one for one in group if one.spec == spec]
            result.attempt(_name(unit, alone), lambda: _pass(unit, trace, options, alone, result))  # noqa: B023


def _possible(trace: Trace, unit: ReplayUnit, options: ReplayOptions, result: UnitResult) -> list[RunRequest]:
    """Return the requests that can run on the trace; the others are added to the result."""
    found = []
    for one in unit.requests:
        budget = None if one.budget is None else Budget.parse(one.budget)
        error = unsupported(trace, parse_policy(one.spec), budget, _with(options, unit, one))
        if error is None:
            found.append(one)
        elif one.optional:
            result.skipped[one.label] = error.what
        else:
            result.failed.append(Failure(_name(unit, [one]), error.what, error.todo))
    return found


def _with(options: ReplayOptions, unit: ReplayUnit, one: RunRequest) -> ReplayOptions:
    """Return the options of a replay, with the cache and the merging rule of a run."""
    return replace(options, plan=one.options(unit.experiment))


def _name(unit: ReplayUnit, requests: Sequence[RunRequest]) -> str:
    """Return what messages call some runs of a unit."""
    labels = ", ".join(dict.fromkeys(one.label for one in requests))
    budgets = ", ".join(dict.fromkeys(one.budget for one in requests if one.budget is not None))
    return f"{labels}{f' at {budgets}' if budgets else ''}: {unit.title}"


def _groups(requests: Sequence[RunRequest]) -> list[list[RunRequest]]:
    """Return the requests in groups with one cache and merging rule, and policies that have the same budgets."""
    variants: dict[tuple[str | None, str | None], list[RunRequest]] = defaultdict(list)
    for one in requests:
        variants[one.cache, one.merge].append(one)
    return [group for own in variants.values() for group in _groups_by_budgets(own)]


def _groups_by_budgets(requests: Sequence[RunRequest]) -> list[list[RunRequest]]:
    """Return the requests in groups of policies that have the same budgets; those without a budget join the first."""
    budgets: dict[str, list[str | None]] = defaultdict(list)
    for one in requests:
        budgets[one.spec].append(one.budget)
    groups: dict[tuple[str | None, ...], list[RunRequest]] = defaultdict(list)
    for one in requests:
        groups[tuple(budgets[one.spec])].append(one)
    unbounded = groups.pop((None,), [])
    found = list(groups.values()) or [[]]
    found[0] += unbounded
    return [group for group in found if group]


def _pass(
    unit: ReplayUnit,
    trace: Trace,
    options: ReplayOptions,
    group: Sequence[RunRequest],
    result: UnitResult,
    progress_callback: Progress | None = None,
) -> None:
    """Replay policies with the same budgets, cache and merging rule; write the record beside it and note its name."""
    policies = {spec: parse_policy(spec) for spec in dict.fromkeys(one.spec for one in group)}
    budgets = list(dict.fromkeys(one.budget for one in group if one.budget is not None)) or ["100%"]
    options = _with(options, unit, group[0])
    if all(policy.traits.clairvoyant for policy in policies.values()):
        options = replace(options, closed=None, generate=None)  # bounds run in the open loop alone
    job = compile_replay(trace, list(policies.values()), budgets, options)
    path = unit.path(group)
    made = job.execute(OutputOptions(path, force=True), progress_callback)  # one without a record is from a killed run
    keys = {(policies[one.spec], one.budget): one.key for one in group}
    record = cell_record(made, unit, job.runs, keys)
    replace_file(unit.store.record_file(path.name), CELL.text(record).encode())
    result.replays.append(path.name)
