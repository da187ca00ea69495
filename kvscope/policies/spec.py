"""From the words of a command line to policies."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from kvscope.core.errors import UsageError
from kvscope.core.own_code import USER_FILE
from kvscope.core.registry import nearest
from kvscope.policies.base import POLICIES, Policy
from kvscope.policies.parameters import (
    all_parameters_of,
    default_of,
    not_of_type,
    parameters_of,
    rule_of,
    rules_of,
    type_name,
)
from kvscope.policies.press import PREFIX, Press, parse_press
from kvscope.policies.tuned import read_tuned

# name:setting=... or name(setting=...), as labels have it; a setting may hold the path of a file, a name may not
_NAMED = re.compile(r"^\s*(?P<name>[\w-]+)\s*(?::(?P<rest>\s*[\w-]+\s*=.*)|\((?P<inside>.*)\)\s*)$")
_TUNED = re.compile(r"^\s*(?P<name>[\w-]+|.+\.py:[A-Za-z_]\w*)\s*:\s*@(?P<file>.+?)\s*$")
_SOURCE = "__kvscope_source__"  # attribute of the module of a file: the bytes that were run
Named = str | Policy | type[Policy]  # what a function takes for a policy
_FILE = re.compile(r"^(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)(?::(?P<rest>.*)|\((?P<inside>.*)\)\s*)?$")


def parse_policies(specs: Sequence[Named], params: Mapping[str, str] | None = None) -> list[Policy]:
    """Return the policies that `specs` name, in order.

    Parameters
    ----------
    specs : sequence of str, Policy or class
        ``a2sf``, ``a2sf:alpha=0.7,recent=16``, ``my_file.py:MyPolicy``, ready policies, which are kept as they are, or
        classes, which get their default parameters and those of `params`.
        ``a2sf(alpha=0.7, recent=16)`` is the same; inside a setting it is the only form: ``vatp:base=a2sf(alpha=0.7)``.
        ``union(h2o, tova)`` is ``union(a=h2o, b=tova)``.
        ``h2o:variant=mask`` is the published code that goes by that name. ``a2sf:@tuned.toml`` has the settings that
        ``kvscope tune`` wrote. ``kvpress:SnapKVPress(window_size=32)`` is a press of kvpress.
    params : mapping of str to str
        Parameters for every policy of `specs` that has them; a policy's own settings win.

    Raises
    ------
    UsageError
        For an unknown policy, an unknown parameter, a value of the wrong type, a parameter that none of the named
        policies has, or the same policy twice.
    """
    shared = {name.replace("-", "_"): value for name, value in (params or {}).items()}
    parsed = [_parsed(spec) for spec in specs]
    classes = [item[0] for item in parsed if not isinstance(item, Policy)]
    for name in shared:
        if not any(name in all_parameters_of(cls) for cls in classes):
            raise UsageError(f"none of the named policies has a parameter {_flag(name)}", _who_has(name))
    policies = []
    for item in parsed:
        if isinstance(item, Policy):
            policies.append(item)
            continue
        cls, own = item
        rule = rule_of(cls, shared | own)
        settings = {name: value for name, value in shared.items() if name in parameters_of(rule)} | own
        policies.append(_build(cls, settings))
    for index, policy in enumerate(policies):
        if policy in policies[:index]:
            raise UsageError(f"policy {policy.label} is named twice", "Name each policy and setting once.")
    return policies


def parse_policy(spec: str) -> Policy:
    """Return the policy that `spec` names; raises UsageError as `parse_policies` does."""
    parsed = _split(spec)
    return parsed if isinstance(parsed, Policy) else _build(*parsed)


def _parsed(spec: Named) -> tuple[type[Policy], dict[str, str]] | Policy:
    if isinstance(spec, type):
        return _named_class(spec, spec.__name__), {}
    return spec if isinstance(spec, Policy) else _split(spec)


def load_class(file: Path, name: str) -> type[Policy]:
    """Return the policy class `name` of a Python file; the file is run once, and again after a change of its content.

    Raises
    ------
    UsageError
        If there is no such file, it fails, or it has no such policy class.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}", "Give the path of a Python file and a class: path/to/file.py:MyPolicy")
    source = file.read_bytes()
    module_name = USER_FILE + hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:12]
    module = sys.modules.get(module_name)
    if module is None or vars(module)[_SOURCE] != source:
        module = _run(file, source, module_name)
    cls = getattr(module, name, None)
    if cls is None:
        known = [
            n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Policy) and v is not Policy
        ]
        raise UsageError(f"{file} has no class {name}", nearest(name, known) if known else "It defines no policy.")
    return _named_class(cls, f"{name} in {file}")


def _run(file: Path, source: bytes, name: str) -> types.ModuleType:
    """Return a new module of that name after the source was run in it.

    The compiled file that Python's own import keeps is not used: it is taken for that of another source of the same
    size and time, so an edit within one second would be overlooked.
    """
    module = types.ModuleType(name)
    vars(module).update({"__file__": str(file), _SOURCE: source})
    sys.modules[name] = module
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(
            f"{file} fails: {type(error).__name__}: {error}", "Correct the file, then try again."
        ) from error
    return module


def _named_class(cls: object, what: str) -> type[Policy]:
    """Return a class of a policy, which has the name of the class if it has none; raises UsageError for another."""
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise UsageError(f"{what} is not a policy", "Derive it from kvscope.Policy.")
    if "__dataclass_params__" not in vars(cls):
        raise UsageError(f"{what} is not a dataclass", "Put @dataclass(frozen=True) above the class.")
    if "name" not in vars(cls):
        cls.name = cls.__name__
    return cls


def _split(spec: str) -> tuple[type[Policy], dict[str, str]] | Policy:
    """Return class and settings, or the finished policy where a file of ``kvscope tune`` gives its settings."""
    if spec.strip().startswith(PREFIX):
        return Press(str(parse_press(spec.strip().removeprefix(PREFIX))))
    tuned = _TUNED.match(spec)
    if tuned:
        user = _FILE.match(tuned["name"])
        tuned_class = load_class(Path(user["file"]), user["name"]) if user else POLICIES.get(tuned["name"])
        return read_tuned(Path(tuned["file"]), tuned_class, _build)
    named, file = _NAMED.match(spec), _FILE.match(spec)
    if named or not file:
        bare, _, rest = spec.partition(":")
        cls = POLICIES.get(named["name"] if named else bare.strip())
        matched = named
    else:
        cls, rest = load_class(Path(file["file"]), file["name"]), ""
        matched = file
    if matched:
        rest = matched["rest"] or matched["inside"] or ""
    settings: dict[str, str] = {}
    unnamed = iter(cls.positional)
    for part in _pieces(rest, spec):
        key, equals, value = _named_part(part, unnamed)
        name = key.strip().replace("-", "_")
        if not equals or not name or not value.strip():
            raise UsageError(
                f"{part!r} in {spec!r} is not a setting", "Write name=value, as in a2sf:alpha=0.7,recent=16"
            )
        if name in settings:
            raise UsageError(f"{name} is set twice in {spec!r}", "Set each parameter once.")
        settings[name] = value.strip()
    return cls, settings


def _named_part(part: str, unnamed: Iterator[str]) -> tuple[str, str, str]:
    """Return name, equals sign and value of a setting; one without a name gets the next of those that need none."""
    key, equals, value = part.partition("=")
    if equals and "(" not in key and ":" not in key:
        return key, equals, value
    name = next(unnamed, None)
    return (key, equals, value) if name is None else (name, "=", part)


def _pieces(text: str, spec: str) -> Iterator[str]:
    """Yield what stands between the commas of `text`, but not between those inside parentheses."""
    depth, start = 0, 0
    for index, sign in enumerate(text + ","):
        depth += (sign == "(") - (sign == ")")
        if depth < 0 or (depth and index == len(text)):
            raise UsageError(f"parentheses do not match in {spec!r}", "Write vatp:base=a2sf(alpha=0.7),norm=l2")
        if sign == "," and not depth:
            if text[start:index].strip():
                yield text[start:index].strip()
            start = index + 1


def _build(cls: type[Policy], settings: Mapping[str, str]) -> Policy:
    rule, several = rule_of(cls, settings), len(rules_of(cls)) > 1
    known = parameters_of(rule)
    values: dict[str, object] = {}
    for name, text in settings.items():
        if name == "variant" and several:
            continue  # it chose the class
        if name not in known:
            own = nearest(name, known) if known else f"{cls.name} has no parameters."
            raise UsageError(f"policy {cls.name} has no parameter {name!r}", own)
        values[name] = _convert(cls.name, name, text, known[name].kind)
    missing = [n for n, (field, _) in known.items() if default_of(field) is MISSING and n not in values]
    if missing:
        raise UsageError(f"policy {cls.name} needs {', '.join(missing)}", f"Write {cls.name}:{missing[0]}=VALUE")
    return rule(**{name: value for name, value in values.items() if known[name].field.init})


def _convert(policy: str, name: str, text: str, kind: object) -> object:
    """Return the text as a value of the field's type: int, float, bool, str, a Literal, or one of these or None."""
    wrong = not_of_type(policy, name, text, kind)
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
    if kind is int or kind is float or kind is str:
        try:
            return kind(text)
        except ValueError:
            raise wrong from None
    raise UsageError(
        f"{policy}: parameter {name} of type {type_name(kind)} cannot be set from text", "Set it in Python."
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _who_has(name: str) -> str:
    having = [policy for policy, cls in POLICIES.items() if name in all_parameters_of(cls)]
    if having:
        return f"{_flag(name)} belongs to: {', '.join(having)}."
    known = sorted({parameter for _, cls in POLICIES.items() for parameter in all_parameters_of(cls)})
    return f"No policy has it. {nearest(name, known)}"
