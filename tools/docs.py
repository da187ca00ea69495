"""Writes the descriptions of the files and policies, and checks that the documentation tells the truth.

python tools/docs.py           write traces/README.md and reports/README.md from the schemas, and the generated part of
                               README.md from the policies
python tools/docs.py --check   change nothing; say what is wrong, and end with status 1 if anything is
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from kvscope import __version__
from kvscope.cli.app import app
from kvscope.policies import POLICIES, spec
from kvscope.results import schema as results
from kvscope.trace import schema as trace

ROOT = Path(__file__).resolve().parent.parent
GENERATED: dict[str, Callable[[], str]] = {
    "traces/README.md": trace.describe,
    "reports/README.md": results.describe,
}
README, BEGIN, END = "README.md", "<!-- policies -->", "<!-- /policies -->"
PAGES = (README, "CONTRIBUTING.md", "CHANGELOG.md", *GENERATED)


def main() -> int:
    """Return the exit status."""
    if "--check" not in sys.argv[1:]:
        for name, text in GENERATED.items():
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_text(text(), encoding="utf-8")
        page = (ROOT / README).read_text(encoding="utf-8")
        (ROOT / README).write_text(with_policies(page), encoding="utf-8")
    wrong = list(problems())
    for line in wrong:
        print(line)
    print(f"docs: {len(wrong)} problems" if wrong else "docs: fine")
    return 1 if wrong else 0


def problems() -> Iterator[str]:
    """Yield a line for everything that the documentation says and that is not so."""
    for name, text in GENERATED.items():
        if not (ROOT / name).is_file() or (ROOT / name).read_text(encoding="utf-8") != text():
            yield f"{name}: differs from the schema; run: python tools/docs.py"
    page = (ROOT / README).read_text(encoding="utf-8")
    if with_policies(page) != page:
        yield f"{README}: the table of policies differs from them; run: python tools/docs.py"
    for name in PAGES:
        if (ROOT / name).is_file():
            text = (ROOT / name).read_text(encoding="utf-8")
            yield from (f"{name}: {line}" for line in _links(ROOT / name, text))
            yield from (f"{name}: {line}" for line in _commands(text))
    if f"\n## {__version__}\n" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield f"CHANGELOG.md: no entry for {__version__}"


def with_policies(page: str) -> str:
    """Return a page with the table of the package's policies between its two marks, which must be there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{README} has no {BEGIN} ... {END}"
    rows = sorted((row for row in spec.describe() if _is_ours(row["name"])), key=lambda row: str(row["name"]))
    head = "| policy | decides per | evicts | needs | variants | proven against |\n|---|---|---|---|---|---|"
    table = "\n".join([head, *(f"| {' | '.join(_cells(row))} |" for row in rows)])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _is_ours(name: str) -> bool:
    """Whether a policy comes with the package: others may be installed beside it."""
    return POLICIES.get(name).__module__.startswith("kvscope.policies.")


def _cells(row: dict[str, Any]) -> list[str]:
    phase = {"step": "at every step", "prefill": "after the prompt", "none": "never"}
    evicts = phase.get(row["phase"]) or f"every {row['phase'].removeprefix('every:')} steps"
    if row["reads"]:
        evicts = "never: reads a part"
    if row["allocate"] != "uniform":
        evicts += f", budgets by `{row['allocate']}`"
    return [
        f"`{row['name']}`",
        row["scope"].replace("_", " "),
        evicts,
        ", ".join(row["needs"]) or "-",
        ", ".join(row["variants"]) or "-",
        row["proven"],
    ]


def _links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not (page.parent / target).exists():
            yield f"links to {target}, which is not there"


def _commands(text: str) -> Iterator[str]:
    """Yield what is wrong with the commands in code blocks and in backticks."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    quoted = [line for line in re.findall(r"`(kvscope [^`]*)`", text) if not line.endswith("=")]
    # parameters of classes that the page itself defines
    own = {name.replace("_", "-") for name in re.findall(r"^    (\w+): .* = parameter\(", text, re.MULTILINE)}
    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parameters = {item["name"].replace("_", "-") for row in spec.describe() for item in row["parameters"]}
    for line in [*blocks, *quoted]:
        words = shlex.split(line, comments=True)
        if len(words) < 2 or words[0] != "kvscope":
            continue
        command = known.get(words[1])
        if command is None:
            yield f"{line!r}: there is no command {words[1]}"
            continue
        flags = {flag for item in command.params for flag in item.opts}
        if words[1] == "replay":
            flags |= {f"--{name}" for name in parameters | own}
        for word in words[2:]:
            if word.startswith("-") and word.partition("=")[0] not in flags:
                yield f"{line!r}: {words[1]} has no option {word}"


if __name__ == "__main__":
    sys.exit(main())
