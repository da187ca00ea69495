"""Read the file of an experiment: YAML or TOML into an `Experiment`."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from kvscope.core.errors import UsageError
from kvscope.core.json_records import FieldError, decode
from kvscope.core.registry import nearest
from kvscope.core.text_files import read_text
from kvscope.core.text_names import text_name
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.policies import POLICIES
from kvscope.policies.spec import parse_policies
from kvscope.tasks import parse_task

KEYS = {each.name for each in fields(Experiment)}
MODEL_KEYS = {each.name for each in fields(ModelEntry)}
LISTS = ("policies", "budgets", "prefill", "tasks", "lengths", "prompts", "seeds", "steps", "metrics", "cache", "merge")
ALL = "all"  # every policy; those that cannot run are skipped
DOCUMENTED = "docs/experiments.md lists every key."


def read_experiment(path: Path) -> Experiment:
    """Return the experiment of a file: YAML, or TOML if its name ends in ``.toml``.

    A value stands for a list of one. Everything that can be checked without a model is checked here.

    Raises
    ------
    UsageError
        If the file cannot be read, a key is unknown or given twice, a value is of another type or out of its range, or
        there is no such task, policy or parameter.
    """
    return experiment_of(read_mapping(path), str(path), text_name(path))


def read_mapping(path: Path) -> Mapping[str, object]:
    """Return the keys of a file and their values: YAML, or TOML if its name ends in ``.toml``.

    Raises
    ------
    UsageError
        If the file cannot be read, or a key is given twice.
    """
    data = _toml(path) if path.suffix == ".toml" else _yaml(path)
    if not isinstance(data, Mapping):
        raise UsageError(f"{path} is not an experiment: it has no keys", f"Write model: demo and more. {DOCUMENTED}")
    return data


def experiment_of(data: Mapping[str, object], file: str, name: str) -> Experiment:
    """Return the experiment in the content of a file; `file` names it in messages. Errors as `read_experiment`."""
    _require_known(data, KEYS | {"model"}, file, "key")
    if "model" in data and "models" in data:
        raise UsageError(f"{file} has both model and models", "Write models: [a, b]")
    given: dict[str, object] = {"name": name, **{key: value for key, value in data.items() if key != "model"}}
    models = data.get("models", data.get("model", ()))
    given["models"] = [_model(each, file) for each in _listed(models)]
    for key in LISTS:
        if data.get(key) is not None:
            given[key] = _listed(data[key])
    given["policies"] = [spec for each in _listed(data.get("policies", ())) for spec in _policies(each, file)]
    given["budgets"] = [_budget(each) for each in _listed(data.get("budgets", "20%"))]
    if "steps" not in data and data.get("prompts"):
        given["steps"] = ["trace", "replay", "closed-loop", "report"]
    try:
        made = decode({key: value for key, value in given.items() if value is not None}, Experiment)
    except FieldError as error:
        raise UsageError(f"{file}: {error}", DOCUMENTED) from error
    for task in made.tasks:
        parse_task(task)
    parse_policies([spec for spec, _ in policy_specs(made.policies)])
    return made


def _require_known(data: Mapping[str, object], known: set[str], file: str, what: str) -> None:
    for key in data:
        if key not in known:
            raise UsageError(f"{file} has an unknown {what} {key!r}", nearest(str(key), sorted(known)))


def _listed(value: object) -> list[object]:
    """Return a list as it is, nothing as an empty one, and anything else as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _model(value: object, file: str) -> object:
    if isinstance(value, str):
        return {"model": value}
    if isinstance(value, Mapping):
        _require_known(value, MODEL_KEYS, file, "key of a model")
    return value


def _budget(value: object) -> object:
    """Return a budget as text; a number with a point is left, and refused as on the command line."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _policies(value: object, file: str) -> list[str]:
    """Return the policies that an item names: itself, or every combination of the values of its parameters."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Mapping):
        raise UsageError(f"{file}: {value!r} is not a policy", "Write h2o, or {a2sf: {alpha: [0.3, 0.7]}}")
    specs = []
    for name, grid in value.items():
        if not isinstance(grid, Mapping):
            raise UsageError(
                f"{file}: the parameters of {name} are not a table", f"Write {{{name}: {{parameter: [0.3, 0.7]}}}}"
            )
        choices = [[f"{key}={_text(one)}" for one in _listed(values)] for key, values in grid.items()]
        specs += [
            f"{name}:{','.join(combination)}" if combination else str(name)
            for combination in itertools.product(*choices)
        ]
    return specs


def _text(value: object) -> str:
    """Return a parameter as on the command line."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _toml(path: Path) -> object:
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", "Correct the file.") from error


def _yaml(path: Path) -> object:
    try:
        return yaml.load(read_text(path), Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}", "Correct the file.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {error}", "Correct the file.") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: list[object] = []
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", key.start_mark)
            seen.append(name)
        return super().construct_mapping(node, deep)


def policy_specs(specs: Sequence[str]) -> list[tuple[str, bool]]:
    """Return the policies of an experiment, and whether each comes from ``all`` alone, so that it may be skipped."""
    named = {spec for spec in specs if spec != ALL}
    found = dict.fromkeys(name for spec in specs for name in (POLICIES.names() if spec == ALL else [spec]))
    return [(spec, spec not in named) for spec in found]
