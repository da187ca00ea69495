"""The cells of an experiment: what each depends on, where it is stored, and which are done."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kvscope.core.experiment_records import CELL, CellRecord, CellRun, Step
from kvscope.core.json import JsonDict
from kvscope.core.options import PlanOptions, Prefill
from kvscope.core.output import checksum
from kvscope.core.records import RUN_FILE
from kvscope.core.version import __version__, versions
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.model.names import resolve
from kvscope.policies import Policy
from kvscope.policies.own import is_own
from kvscope.policies.press import Press
from kvscope.trace.schema import HEADER

SHORT = 12  # digits of an address in the name of a folder
WHOLE = 10_000_000  # bytes of a file of a model up to which its content counts; of larger ones size and date do


@dataclass(frozen=True)
class Store:
    """Where the cells of all experiments are.

    Attributes
    ----------
    traces, replays : Path
        Folders of traces, and of replays with their records.
    """

    traces: Path
    replays: Path

    @classmethod
    def under(cls, traces: Path, reports: Path) -> Store:
        """Return the store in the folders of traces and reports."""
        return cls(traces / "cells", reports / "cells")

    def records(self) -> Iterator[CellRecord]:
        """Yield the record of every replay that is there, in the order of their names.

        Raises
        ------
        ResultError
            If a record is damaged.
        """
        for file in sorted(self.replays.glob("*.json")):
            if (file.with_suffix("") / RUN_FILE).is_file():
                yield CELL.read(file, CellRecord, example="Name the record of a cell.")

    def record_file(self, replay: str) -> Path:
        """Return where the record of a replay is."""
        return self.replays / f"{replay}.json"


@dataclass(frozen=True)
class Texts:
    """The prompts of one trace: examples of a task, or a file.

    Attributes
    ----------
    name : str
        What messages call them: ``needle 512``, ``questions``.
    task, length, seed
        Of a task.
    file : str or None
        Of a file of prompts.
    """

    name: str
    task: str | None = None
    length: int | None = None
    seed: int = 0
    file: str | None = None


@dataclass(frozen=True)
class TraceCell:
    """A trace of an experiment.

    Attributes
    ----------
    model : ModelEntry
        The model.
    texts : Texts
        The prompts.
    address : str
        SHA-256 of all that the trace depends on.
    path : Path
        Its folder.
    """

    model: ModelEntry
    texts: Texts
    address: str
    path: Path

    @property
    def done(self) -> bool:
        """Whether the trace is there."""
        return (self.path / HEADER).is_file()

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.model.title}, {self.texts.name}"


def trace_cells(experiment: Experiment, store: Store) -> list[TraceCell]:
    """Return the traces of an experiment: of each model, each task at each length and seed, then each file of prompts.

    Raises
    ------
    OSError
        If a file of prompts or a haystack cannot be read.
    """
    texts = [
        Texts(_task_name(task, length, seed), task, length, seed)
        for task in experiment.tasks
        for length in experiment.lengths
        for seed in experiment.seeds
    ]
    texts += [Texts(Path(file).name, file=file) for file in experiment.prompts]
    found = []
    for model in experiment.models:
        identity = model_identity(model)
        for each in texts:
            address = digest({"model": identity, **_depends_on(experiment, each)})
            name = readable(f"{model.model.rstrip('/').rpartition('/')[2]}-{each.name}")
            found.append(TraceCell(model, each, address, store.traces / f"{name}-{address[:SHORT]}"))
    return found


def _task_name(task: str, length: int, seed: int) -> str:
    """Return the name of prompts, which is part of that of a folder: the same whatever else the experiment has."""
    return f"{task} {length}" + (f" seed {seed}" if seed else "")


def _depends_on(experiment: Experiment, texts: Texts) -> JsonDict:
    """Return all that a trace depends on besides its model."""
    common: JsonDict = {
        "kvscope": __version__,
        "chat": experiment.chat,
        "system": experiment.system,
        "max_new_tokens": experiment.max_new_tokens,
        "store": experiment.store,
        "hidden": experiment.hidden,
    }
    if texts.file is None:
        haystack = None if experiment.haystack is None else checksum(Path(experiment.haystack))
        own: JsonDict = {
            "task": texts.task,
            "length": texts.length,
            "examples": experiment.examples,
            "seed": texts.seed,
            "haystack": haystack,
        }
    else:
        own = {"prompts": content(Path(texts.file)), "field": experiment.field, "template": experiment.template}
    return common | own


def model_identity(model: ModelEntry) -> JsonDict:
    """Return what a model is: its name and how it is loaded; of a local folder or file also its content.

    Of files above 10 MB, the weights, size and date count, because reading them takes longer than running them.
    """
    source = Path(resolve(model.model))
    files = sorted(source.rglob("*")) if source.is_dir() else [source] if source.is_file() else []
    own: JsonDict = {str(file.relative_to(source)): _file_identity(file) for file in files if file.is_file()}
    chosen = {name: value for name, value in asdict(model).items() if name != "device_map"}
    return {**chosen, "files": own}


def _file_identity(file: Path) -> str:
    about = file.stat()
    return checksum(file) if about.st_size <= WHOLE else f"{about.st_size} bytes of {about.st_mtime_ns}"


def content(path: Path) -> str:
    """Return the SHA-256 of a file, or of all files in a folder."""
    if not path.is_dir():
        return checksum(path)
    return digest({str(file.relative_to(path)): checksum(file) for file in sorted(path.rglob("*")) if file.is_file()})


def run_key(
    experiment: Experiment,
    cell: TraceCell,
    prefill: Prefill,
    policy: Policy,
    budget: str | None,
    options: PlanOptions | None = None,
) -> str:
    """Return the SHA-256 of all that one run depends on, besides the steps that are done for it.

    Its options are those of the experiment unless they are given.
    """
    return digest(
        {
            "trace": cell.address,
            "prefill": prefill,
            "policy": policy_identity(policy),
            "budget": budget,
            "metrics": None if experiment.metrics is None else list(experiment.metrics),
            "score": experiment.score,
            "positions": experiment.positions,
            **{name: value for name, value in asdict(options or experiment.plan).items() if name != "params"},
        }
    )


def policy_identity(policy: Policy) -> JsonDict:
    """Return what a policy is: name, parameters, and the content of the files that it is defined in or reads."""
    parameters = policy.parameters()
    files = {str(value): content(Path(value)) for value in _texts_in(parameters) if _is_path(value)}
    if is_own(policy):
        code = Path(inspect.getfile(type(policy)))
        files[code.name] = checksum(code)
    made: JsonDict = {"name": policy.name, "label": policy.label, "parameters": repr(parameters), "files": dict(files)}
    if isinstance(policy, Press):
        made["kvpress"] = versions("kvpress")["kvpress"]
    return made


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts_in(each)
    elif isinstance(value, Policy):
        yield from _texts_in(value.parameters())
    elif isinstance(value, str):
        yield value


def _is_path(text: str) -> bool:
    """Return whether a parameter is the path of a file that exists, and not a word that a folder here happens to have.

    A word without a dot or a slash, as ``demo`` or ``mean``, is a choice.
    """
    return ("." in text or "/" in text) and Path(text).is_file()


def digest(value: JsonDict) -> str:
    """Return the SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def readable(name: str) -> str:
    """Return `name` as part of a file name, at most 60 characters."""
    return re.sub(r"[^\w.+]+", "-", name).strip("-.")[:60]


class Done:
    """The runs that are there, by their keys.

    Parameters
    ----------
    store : Store
        Where to look.
    """

    def __init__(self, store: Store) -> None:
        self._runs: dict[str, list[tuple[CellRecord, CellRun]]] = {}
        for record in store.records():
            for run in record.runs:
                self._runs.setdefault(run.key, []).append((record, run))

    def find(self, key: str, steps: tuple[Step, ...]) -> tuple[CellRecord, CellRun] | None:
        """Return the record and the run of a key for which at least these steps were done; None if there is none."""
        return next((found for found in self._runs.get(key, []) if set(steps) <= set(found[0].steps)), None)
