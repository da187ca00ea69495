"""Every block of code in the documentation runs as pasted, in the order of its page; what cannot run here is parsed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from kvscope.cli.app import program
from kvscope.cli.app import run as run_command
from tests.docs.blocks import ROOT, Block, blocks, commands, expected_status, found, pages
from tests.own_code import forget_members, forget_modules

RUN = ("sh", "python")
SHOWN = ("yaml", "json", "toml", "bibtex")  # what a reader writes or gets; a file of it is written
SHELL = set("|<>&;")


@pytest.fixture
def _own_names() -> Iterator[None]:
    """Forget the policies and metrics that a page registers, which no other test expects."""
    yield
    forget_modules()
    forget_members()


class Page:
    """A page that is run in the current folder."""

    def __init__(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.name, self.capsys, self.scope = name, capsys, dict[str, Any]()

    def run(self) -> None:
        """Run the blocks of a page."""
        for block in blocks(self.name):
            if block.reason is None:
                self.block(block)

    def block(self, block: Block) -> None:
        """Run one block."""
        where = f"{self.name}:{block.line}"
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            forget_modules()
            exec(compile(block.text, where, "exec"), self.scope)
        elif block.language == "sh":
            for command in commands(block.text):
                self.command(command, where)

    def command(self, command: str, where: str) -> None:
        """Run one command: of kvscope in this process, others and what needs a shell in bash."""
        self.capsys.readouterr()
        words = shlex.split(command, comments=True)
        if words[0] == "kvscope" and not any(set(word) <= SHELL for word in words):
            forget_modules()
            status, err = run_command(words[1:]), self.capsys.readouterr().err
        else:
            shim = 'kvscope() { "$PYTHON" -m kvscope "$@"; }\npip() { false; }\nset -eu\n'
            environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(["bash", "-c", shim + command], env=environment, capture_output=True, text=True)
            status, err = done.returncode, done.stderr
        assert status == expected_status(command), f"{where}: {command}\n{err}"


@pytest.mark.slow
@pytest.mark.usefixtures("_own_names")
@pytest.mark.parametrize(
    "name", [name for name in pages() if any(block.reason is None and block.language in RUN for block in blocks(name))]
)
def test_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Page(name, capsys).run()


NOT_RUN = [(name, block) for name in pages() for block in blocks(name) if block.reason is not None]


@pytest.mark.parametrize(("name", "block"), NOT_RUN, ids=[f"{name}:{block.line}" for name, block in NOT_RUN])
def test_what_is_not_run_has_a_reason_and_parses(name: str, block: Block) -> None:
    assert len(str(block.reason)) > 10
    if block.language == "python":
        compile(block.text, f"{name}:{block.line}", "exec")
    if block.language == "sh":
        for command in commands(block.text):
            words = shlex.split(command.partition(" | ")[0], comments=True)
            if words[0] == "kvscope":
                parse(words[1:])


def parse(words: list[str]) -> None:
    """Parse the arguments of a command without running it; a wrong one raises."""
    command = typer.main.get_command(program())
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("kvscope", list(words), resilient_parsing=False)


def test_marks_files_and_here_documents_are_read() -> None:
    text = "<!-- not run: it needs a GPU -->\n```sh\na \\\n  b # exit status 3\n```\n"
    marked, file = found(f"{text}  ```python\n  # my.py\n  x = 1\n  ```\n")
    assert (marked.reason, list(commands(marked.text))) == ("it needs a GPU", ["a \\\n  b # exit status 3"])
    assert expected_status(marked.text) == 3
    assert (file.file, file.text, file.reason) == ("my.py", "# my.py\nx = 1\n", None)
    assert list(commands("cat > a <<'END'\n\n# one\nEND\n# no command\nb")) == ["cat > a <<'END'\n\n# one\nEND", "b"]


@pytest.mark.parametrize("wrong", ["report --budgte 20%", "trace --model", "replay --prefill never", "nothing"])
def test_wrong_commands_do_not_parse(wrong: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  of Typer's parser
        parse(wrong.split())


def test_every_language_is_run_or_shown() -> None:
    for name in pages():
        for block in blocks(name):
            assert block.language in (*RUN, *SHOWN), f"{name}:{block.line}: mark output as text"
