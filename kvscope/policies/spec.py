"""From the words of a command line to policies, and from policies to their description."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kvscope.errors import UsageError
from kvscope.policies.base import POLICIES, Policy
from kvscope.registry import nearest

_FILE = re.compile(r"^(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)(?::(?P<rest>.*))?$")


def parse_policies(specs: Sequence[str | Policy], params: Mapping[str, str] | None = None) -> list[Policy]:
    """Return the policies that `specs` name, in order.

    Parameters
    ----------
    specs : sequence of str or Policy
        ``a2sf``, ``a2sf:alpha=0.7,recent=16``, ``my_file.py:MyPolicy``, or ready policies, which are kept as they are.
    params : mapping of str to str
        Parameters for every policy of `specs` that has them; a policy's own settings win.

    Raises
    ------
    UsageError
        For an unknown policy, an unknown parameter, a value of the wrong type, a parameter that none of the named
        policies has, or the same policy twice.
    """
    shared = {name.replace("-", "_"): value for name, value in (params or {}).items()}
    parsed = [spec if isinstance(spec, Policy) else _split(spec) for spec in specs]
    classes = [item[0] for item in parsed if not isinstance(item, Policy)]
    for name in shared:
        if not any(name in _parameters(cls) for cls in classes):
            raise UsageError(f"none of the named policies has a parameter {_flag(name)}", _who_has(name))
    policies = []
    for item in parsed:
        if isinstance(item, Policy):
            policies.append(item)
            continue
        cls, own = item
        settings = {name: value for name, value in shared.items() if name in _parameters(cls)} | own
        policies.append(_build(cls, settings))
    for index, policy in enumerate(policies):
        if policy in policies[:index]:
            raise UsageError(f"policy {policy.label} is named twice", "Name each policy and setting once.")
    return policies


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Return what there is to know about one policy or all: summary, doc, parameters, paper, needs, scope, phase."""
    classes = [POLICIES.get(name)] if name else [cls for _, cls in POLICIES.items()]
    rows = []
    for cls in classes:
        doc = inspect.getdoc(cls) or ""
        rows.append(
            {
                "name": cls.name,
                "summary": doc.split("\n", 1)[0],
                "doc": doc,
                "parameters": [
                    {
                        "name": field.name,
                        "type": _type_name(kind),
                        "default": _default(field),
                        "help": str(field.metadata.get("help", "")),
                    }
                    for field, kind in _parameters(cls).values()
                ],
                "paper": cls.paper,
                "needs": sorted(cls.needs),
                "scope": cls.scope,
                "phase": cls.phase,
            }
        )
    return rows


def load_class(file: Path, name: str) -> type[Policy]:
    """Return the policy class `name` of a Python file; the file is run once.

    Raises
    ------
    UsageError
        If there is no such file, it fails, or it has no such policy class.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}", "Give the path of a Python file and a class: path/to/file.py:MyPolicy")
    module_name = "kvscope_user_" + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]
    module = sys.modules.get(module_name)
    if module is None:
        module_spec = importlib.util.spec_from_file_location(module_name, file)
        assert module_spec is not None and module_spec.loader is not None, f"{file} ends in .py"
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UsageError(
                f"{file} fails: {type(error).__name__}: {error}", "Mend the file, then try again."
            ) from error
    cls = getattr(module, name, None)
    if cls is None:
        known = [
            n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Policy) and v is not Policy
        ]
        raise UsageError(f"{file} has no class {name}", nearest(name, known) if known else "It defines no policy.")
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise UsageError(f"{name} in {file} is not a policy", "Derive it from kvscope.Policy.")
    if "__dataclass_params__" not in vars(cls):
        raise UsageError(f"{name} in {file} is not a dataclass", "Put @dataclass(frozen=True) above the class.")
    if "name" not in vars(cls):
        cls.name = name
    return cls


def _split(spec: str) -> tuple[type[Policy], dict[str, str]]:
    matched = _FILE.match(spec)
    if matched:
        cls = load_class(Path(matched["file"]), matched["name"])
        rest = matched["rest"] or ""
    else:
        name, _, rest = spec.partition(":")
        cls = POLICIES.get(name.strip())
    settings: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(
                f"{part!r} in {spec!r} is not a setting", "Write name=value, as in a2sf:alpha=0.7,recent=16"
            )
        settings[key.strip().replace("-", "_")] = value.strip()
    return cls, settings


def _parameters(cls: type[Policy]) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(cls)
    return {field.name: (field, hints[field.name]) for field in fields(cls)}


def _build(cls: type[Policy], settings: Mapping[str, str]) -> Policy:
    known = _parameters(cls)
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if name not in known:
            own = nearest(name, known) if known else f"{cls.name} has no parameters."
            raise UsageError(f"policy {cls.name} has no parameter {name!r}", own)
        values[name] = _convert(cls.name, name, text, known[name][1])
    missing = [n for n, (field, _) in known.items() if _default(field) is MISSING and n not in values]
    if missing:
        raise UsageError(f"policy {cls.name} needs {', '.join(missing)}", f"Write {cls.name}:{missing[0]}=VALUE")
    return cls(**values)


def _convert(policy: str, name: str, text: str, kind: Any) -> Any:
    """Return the text as a value of the field's type: int, float, bool, str, a Literal, or one of these or None."""
    wrong = UsageError(f"{policy}: {name}={text!r} is not {_type_name(kind)}", f"See: kvscope policies {policy}")
    if get_origin(kind) in (Union, types.UnionType):
        choices = get_args(kind)
        if type(None) in choices and text.lower() == "none":
            return None
        return _convert(policy, name, text, next(choice for choice in choices if choice is not type(None)))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise wrong
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            raise wrong from None
    raise UsageError(
        f"{policy}: parameter {name} of type {_type_name(kind)} cannot be set from text", "Set it in Python."
    )


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in get_args(kind))
    return "none" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _who_has(name: str) -> str:
    having = [policy for policy, cls in POLICIES.items() if name in _parameters(cls)]
    if having:
        return f"{_flag(name)} belongs to: {', '.join(having)}."
    known = sorted({parameter for _, cls in POLICIES.items() for parameter in _parameters(cls)})
    return f"No policy has it. {nearest(name, known)}"
