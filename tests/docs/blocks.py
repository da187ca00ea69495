"""The blocks of code in the pages of the documentation, and how a test runs them.

Blocks of shell and Python are run in the order of their page, in one folder. A block whose first line is a comment with
the name of a file, as ``# mine.py``, is written to this file instead. Marks in front of a block, and after a command:

``<!-- not run: REASON -->``
    The block below needs what a test has not, as a GPU. Its commands are parsed, not run.
``# exit status N``
    The status that the command ends with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = "docs/policies/"  # examples of docstrings, which pytest runs as doctests


BLOCK = r"(<!-- not run: ([^>]+?) -->\n+)?^( *)```(\w+)\n(.*?)^ *```$"


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, its line in the page, and the reason why it is not run."""

    language: str
    text: str
    line: int
    reason: str | None

    @property
    def file(self) -> str | None:
        """The file that the block is the content of."""
        first = re.match(r"# ([\w./-]+\.(?:py|yaml|toml|jsonl|txt|json))\n", self.text)
        return first[1] if first else None


def pages() -> list[str]:
    """Return the pages with blocks of code, relative to the repository."""
    names = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]
    return [name for name in names if not name.startswith(EXAMPLES) and blocks(name)]


def blocks(name: str) -> list[Block]:
    """Return the blocks of a page."""
    return list(found((ROOT / name).read_text(encoding="utf-8")))


def found(text: str) -> Iterator[Block]:
    """Yield the blocks of a text that have a language; plain text is output, which is not run."""
    for match in re.finditer(BLOCK, text, re.DOTALL | re.MULTILINE):
        indent, language = len(match[3]), match[4]
        if language != "text":
            lines = "".join(line[indent:] or "\n" for line in match[5].splitlines(keepends=True))
            yield Block(language, lines, text.count("\n", 0, match.start(4)) + 1, match[2])


def commands(block: str) -> Iterator[str]:
    """Yield the commands of a block; a here-document and continued lines belong to their command."""
    lines = iter(block.splitlines())
    for line in lines:
        mark = re.search(r"<<'(\w+)'", line)
        command = [line]
        while command[-1].endswith("\\"):
            command.append(next(lines))
        while mark and command[-1] != mark[1]:
            command.append(next(lines))
        if line.strip() and not line.startswith("#"):
            yield "\n".join(command)


def expected_status(command: str) -> int:
    """Return the exit status that the comment after a command states, or 0."""
    stated = re.search(r"#.*\bexit status (\d+)", command)
    return int(stated[1]) if stated else 0
