"""The quickstart of the documentation runs as pasted, in order, in an empty folder."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kvscope.policies import POLICIES
from tests.cli.conftest import Run
from tests.own_code import forget_modules

DOCS = Path(__file__).parent.parent.parent / "docs"
START = (DOCS / "start.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """Return the shell blocks from the first five minutes to the own model."""
    section = page.partition("\n## The first five minutes\n")[2].partition("\n## Your own model\n")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def commands(block: str) -> Iterator[str]:
    """Yield the commands of a block; a here-document belongs to its command."""
    lines = iter(block.splitlines())
    for line in lines:
        mark = re.search(r"<<'(\w+)'$", line)
        document = [line]
        while mark and document[-1] != mark[1]:
            document.append(next(lines))
        yield "\n".join(document)


def expected_status(command: str) -> int:
    """Return the exit status that the comment after a command states, or 0."""
    stated = re.search(r"#.*\bexit status (\d+)", command)
    return int(stated[1]) if stated else 0


def test_the_quickstart(run: Run, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    statuses = []
    for command in (command for block in blocks(START) for command in commands(block)):
        if command.startswith("kvscope "):
            forget_modules()
            done = run(*shlex.split(command, comments=True)[1:])
            statuses.append(done.status)
            assert done.status == expected_status(command), f"{command}: {done.err}"
        else:
            subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    assert statuses.count(3) == 1, "one diff finds the regression that it announces"
    assert len(list(Path("reports").glob("*.html"))) == 1


def test_the_quickstart_is_complete() -> None:
    first, *_ = blocks(START)
    assert re.match(r"cat > prompt\.txt <<", first), "the first block writes its own prompt"
    used = [command.split()[1] for block in blocks(START) for command in commands(block) if command[:7] == "kvscope"]
    assert list(dict.fromkeys(used)) == ["trace", "replay", "report", "spans", "regret", "diff", "policies"]


def test_the_quickstart_replays_policies_that_do_well_in_the_table_of_outcomes() -> None:
    """Of the policies that hold as many keys on average, at most three have a lower perplexity ratio."""
    table = (
        (DOCS / "outcomes.md")
        .read_text(encoding="utf-8")
        .partition("<!-- outcomes -->")[2]
        .partition("<!-- /outcomes -->")[0]
    )
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines() if "`" in line]
    ratios = {row[0]: float(row[4]) for row in rows if row[4] != "-"}
    held = {row[0]: int(row[6]) for row in rows if row[6] != "-"}
    command = next(command for command in commands(blocks(START)[0]) if command.startswith("kvscope replay"))
    chosen = re.findall(r"--policy (\S+)", command)
    assert len(chosen) == 2 and all(name in POLICIES.names() for name in chosen)
    for name in chosen:
        same_size = [ratio for other, ratio in ratios.items() if held[other] == held[name] and other not in chosen]
        assert sum(ratio < ratios[name] for ratio in same_size) <= 3, f"{name} is not among the best"


def test_here_documents_and_statuses_are_read() -> None:
    block = "cat > a <<'END'\none\ntwo\nEND\nkvscope diff a b  # exit status 3: worse\n"
    assert list(commands(block)) == ["cat > a <<'END'\none\ntwo\nEND", "kvscope diff a b  # exit status 3: worse"]
    assert [expected_status(command) for command in commands(block)] == [0, 3]
