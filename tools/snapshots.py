"""Rewrite the snapshots of what commands print on terminals of 80, 120 and 200 columns.

``python tools/snapshots.py`` after an intended change of an output; read the difference before it is committed.
``tests/cli/test_snapshots.py`` compares them.

Help is printed at each width. The commands of `SESSION` are run one after another in an empty folder, on the bundled
model in float64 on the CPU, each of them once; the calls that print are recorded, and repeated at each width. In what
they print, `MASKS` replaces what differs from one run or machine to the next, before it is printed, so that lines wrap
at the same words everywhere:

- sizes of files, memory and free disk space, which depend on the libraries that compress and on the disk;
- times, versions and the identities of traces, which are checksums of all bits of a recording;
- differences of logits in float64, which are errors of summation.

All other figures are shown. Their last digit may depend on the order of summation in a processor's kernels: `same`
allows a decimal fraction of `SESSION` to differ by one in its last digit, and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import pkgutil
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "tests" / "snapshots"
WIDTHS = (80, 120, 200)
HELP = {
    "help": "--help",
    "help-trace": "trace --help",
    "help-replay": "replay --help",
    "help-perplexity": "perplexity --help",
    "help-diff": "diff --help",
}

NOTES = """The captain looked at the sea. It was late, and the ship had not come.
Note: Clara holds 583.
He walked along the wall, and thought of the letter that he had read in the morning.

Question: what holds Clara? Answer: Clara holds"""
MINE = '''from dataclasses import dataclass

from kvscope import Policy, policy


@policy("fading")
@dataclass(frozen=True)
class Fading(Policy):
    """Retain the keys with the largest sums of attention, where old sums fade."""

    def observe(self, step, score):
        return {fade} * score + step.weights()
'''
SWEEP = """model: {model: demo, dtype: float64}
device: cpu
prompts: notes.txt
max_new_tokens: 8
policies: [h2o, streaming-llm]
budgets: [20%, 40%]
steps: [trace, replay, closed-loop]
"""


@dataclass(frozen=True)
class Step:
    """A command of the session: its snapshot (none without a name), the files written before it, its exit status."""

    name: str
    line: str
    files: dict[str, str] = field(default_factory=dict)
    status: int = 0


SESSION = (
    Step("policies", "policies"),
    Step("policies-a2sf", "policies a2sf"),
    Step("policies-kvpress", "policies kvpress"),
    Step("replay-misspelt", "replay --polcy h2o", status=2),
    Step(
        "trace", "trace notes.txt --model demo --dtype float64 --device cpu --max-new-tokens 12", {"notes.txt": NOTES}
    ),
    Step(
        "replay", "replay --policy h2o --policy streaming-llm --policy snapkv --policy quest --budget 20%,40% -o first"
    ),
    Step("replay-closed", "replay --policy h2o --policy tova --budget 20%,40% --perplexity --dtype float64 -o closed"),
    Step("report", "report first"),
    Step("spans", "spans first --span fact=text:583"),
    Step("heads", "heads notes-demo --span fact=33:36"),
    Step("regret", "regret first"),
    Step("regret-run", "regret first --policy h2o --budget 20% --top 5"),
    Step("info-trace", "info notes-demo"),
    Step("info-replay", "info first"),
    Step("verify", "verify --policy h2o --policy tova --budget 20% --dtype float64 --device cpu --tokens 6"),
    Step(
        "perplexity",
        "perplexity notes.txt --model demo --dtype float64 --device cpu --window 48 --policy h2o --policy tova "
        "--budget 8,16 -o text",
    ),
    Step("diff", "diff first first"),
    Step("", "replay --policy mine.py:Fading --budget 20% -o old", {"mine.py": MINE.format(fade=0.5)}),
    Step("", "replay --policy mine.py:Fading --budget 20% -o new", {"mine.py": MINE.format(fade=1.0)}),
    Step("diff-worse", "diff old new", status=3),
    Step("diff-decisions", "diff old new --decisions --first 3", status=3),
    Step("export", "export first --format csv"),
    Step("run", "run sweep.yaml", {"sweep.yaml": SWEEP}),
)
COMMANDS = HELP | {step.name: step.line for step in SESSION if step.name}
MASKS = (
    (re.compile(r"\d+(\.\d+)? [kMGT]?B\b"), "#.# MB"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 by kvscope \S+"), "####-##-##T##:##:##+00:00 by kvscope #.#.#"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "#" * 16),
    (re.compile(r"\b\d\.\de-1\d\b"), "#.#e-1#"),
)
FRACTION = re.compile(r"(?<![\w.])[+-]?\d+\.\d+")
# Functions of `kvscope.cli.console` through which every command prints.
PRINTING = ("note", "warn", "fail", "show_json", "show_table", "show_pairs", "show_text", "show_raw")
Call = Callable[[], object]


def main() -> int:
    """Write every snapshot and return 0."""
    FOLDER.mkdir(exist_ok=True)
    for name in COMMANDS:
        for width in WIDTHS:
            (FOLDER / f"{name}-{width}.txt").write_text(printed(name, width), "utf-8")
    return 0


def printed(name: str, width: int) -> str:
    """Return what a command of `COMMANDS` prints at a width, without spaces at the ends of lines."""
    with _terminal(width) as stream:
        if name in HELP:
            from kvscope.cli.app import run

            run(shlex.split(HELP[name]))
        else:
            for call in _session()[name]:
                call()
    lines = (line.rstrip() for line in stream.getvalue().splitlines())
    return "\n".join([f"$ kvscope {COMMANDS[name]}", *lines]) + "\n"


def same(one: str, other: str) -> bool:
    """Return whether two outputs are equal, but for one in the last digit of decimal fractions."""
    fractions = FRACTION.findall(one), FRACTION.findall(other)
    return FRACTION.sub("#", one).split() == FRACTION.sub("#", other).split() and all(
        _digits(first) == _digits(second) and abs(float(first) - float(second)) < 1.5 * 10 ** -_digits(first)
        for first, second in zip(*fractions, strict=True)
    )


def _digits(fraction: str) -> int:
    return len(fraction.partition(".")[2])


@functools.cache
def _session() -> dict[str, list[Call]]:
    """Return for each command of `SESSION` the calls by which it printed, once it has been run."""
    from kvscope.cli.app import run
    from tests.own_code import forget_members, forget_modules

    found: dict[str, list[Call]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), _silence():
        for step in SESSION:
            for name, text in step.files.items():
                Path(name).write_text(text, "utf-8")
            with _recorded() as calls:
                status = run(shlex.split(step.line))
            assert status == step.status, f"kvscope {step.line}: status {status}"
            found[step.name] = calls
            if forget_modules():  # the next command reads the file of a policy again, as a new process does
                forget_members()
    return found


@contextlib.contextmanager
def _recorded() -> Iterator[list[Call]]:
    """Yield a list of the calls of `PRINTING` from here on, with masked arguments."""
    import kvscope.cli
    from kvscope.cli import console

    modules = [
        importlib.import_module(f"{kvscope.cli.__name__}.{each.name}")
        for each in pkgutil.iter_modules(kvscope.cli.__path__)
    ]
    calls: list[Call] = []
    replaced = []
    for name in PRINTING:
        function = getattr(console, name)

        def record(*args: Any, function: Callable[..., object] = function, **kwargs: Any) -> None:
            calls.append(functools.partial(function, *masked(args), **masked(kwargs)))

        for module in modules:
            if getattr(module, name, None) is function:
                setattr(module, name, record)
                replaced.append((module, name, function))
    try:
        yield calls
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def masked(value: Any) -> Any:
    """Return a value with `MASKS` applied to all texts in it."""
    from kvscope.cli.console import Column

    if isinstance(value, str):
        for pattern, mask in MASKS:
            value = pattern.sub(mask, value)
        return value
    if isinstance(value, Column):
        return replace(value, cells=masked(value.cells))
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(masked(item) for item in value)
    return value


@contextlib.contextmanager
def _terminal(width: int) -> Iterator[io.StringIO]:
    """Yield the stream that stdout and stderr are: a terminal of this width that has no colours."""
    stream, before = _Terminal(), dict(os.environ)
    os.environ |= {"COLUMNS": str(width), "LINES": "50", "TERM": "dumb"}
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield stream
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


if __name__ == "__main__":
    sys.exit(main())
