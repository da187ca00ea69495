"""``kvscope export`` and ``kvscope compare`` as a user types them, and what the documentation does with the output."""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from kvscope.results.store import open_replay
from tests.cli.conftest import PROMPT, Run, maps, quietly

ROOT = Path(__file__).parent.parent.parent
TABLES = (ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
COMPARE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where ``reports/everything`` has two policies at two budgets, over six sequences."""
    folder = tmp_path_factory.mktemp("export")
    with contextlib.chdir(folder):
        np.savez("six.npz", attention=np.stack([maps(seed=seed) for seed in range(6)]))
        quietly("import", "six.npz", "--prompt-length", PROMPT)
        quietly("replay", "--policy", "h2o", "--policy", "tova", "--budget", "25%,50%", "-o", "everything")
    return folder


@pytest.fixture
def everything(run: Run, made: Path) -> Run:
    """The command line in a copy of that folder."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return run


def code(library: str) -> str:
    """Return the example of the documentation that uses a library."""
    blocks = re.findall(r"```python\n(.*?)```", TABLES, re.DOTALL)
    return next(block for block in blocks if f"import {library}" in block)


def test_the_tables_of_the_documentation(everything: Run) -> None:
    command = re.search(r"^kvscope (export .*)$", TABLES, re.MULTILINE)
    assert command is not None
    done = everything(*command[1].split())
    assert done.status == 0, done.err
    assert done.out.split() == [f"reports/tables/{name}.parquet" for name in ("fidelity", "residency", "runs")]
    replay = open_replay("reports/everything")
    runs = {run.run: (run.policy, run.budget) for run in replay.info.runs}

    fidelity = replay.fidelity()
    fidelity = fidelity.groupby(["run", "sequence", "layer", "head"]).mean().groupby(["run", "layer"]).mean()
    expected = {(*runs[run], layer): mass for (run, layer), mass in fidelity["retained_mass"].items()}
    scope: dict[str, object] = {}
    exec(code("duckdb"), scope)
    rows = scope["masses"].fetchall()  # type: ignore[attr-defined]
    assert {tuple(place): mass for *place, mass in rows} == pytest.approx(expected, abs=1e-6)
    assert [row[-1] for row in rows] == sorted(row[-1] for row in rows)

    shares = replay.residency().groupby("run")["leave"].agg(lambda leave: leave.isna().mean())
    exec(code("polars"), scope)
    found = {(policy, budget): share for policy, budget, share in scope["kept"].rows()}  # type: ignore[attr-defined]
    assert found == pytest.approx({runs[run]: share for run, share in shares.items()})


def test_export_names_and_protects_its_output(everything: Run) -> None:
    done = everything("export", "--format", "csv", "--json")
    assert done.status == 0, done.err
    assert "reports/everything" in done.err, "what was taken is said"
    told = json.loads(done.out)
    assert told["export"] == "reports/everything-csv"
    assert all(Path(table).is_file() for table in told["tables"])
    assert everything("export", "everything", "-o", "mine", "-q").status == 0
    done = everything("export", "everything", "-o", "mine")
    assert done.status == 1
    assert "--force" in done.two_lines()[1]
    assert everything("export", "everything", "-o", "mine", "--format", "arrow", "--force").status == 0
    assert {file.suffix for file in Path("reports/mine").iterdir()} == {".json", ".arrow"}
    assert everything("export", "nothing").status == 1
    assert everything("export", "everything", "--per", "key").status == 2
    assert everything("report", "-q").status == 0, "the newest replay is the replay, not an export of it"


def test_compare_two_policies(everything: Run) -> None:
    done = everything("compare", "everything")
    assert done.status == 0, done.err
    assert "A = h2o, B = tova" in done.out
    assert len(re.findall(r"^\S*%? ?\S* +retained_mass ", done.out, re.MULTILINE)) == 2
    told = json.loads(everything("compare", "-p", "tova", "-p", "h2o", "--metric", "retained_mass", "--json").out)
    assert (told["a"], told["b"]) == ("tova", "h2o")
    assert [row["budget"] for row in told["rows"]] == ["25%", "50%"]
    assert {row["sequences"] for row in told["rows"]} == {6}
    assert {row["smallest_p"] for row in told["rows"]} == {2 / 2**6}
    assert told["warnings"] == []
    command = re.search(r"^kvscope (compare .*)$", COMPARE, re.MULTILINE)
    assert command is not None
    assert everything(*command[1].split()).status == 0


def test_compare_two_replays(everything: Run) -> None:
    assert everything("replay", "--policy", "h2o", "--budget", "25%", "-o", "later", "-q").status == 0
    done = everything("compare", "everything", "later", "--policy", "h2o", "--metric", "retained_mass")
    assert done.status == 0, done.err
    assert "A = h2o of everything, B = h2o of later" in done.out
    assert "0 of 6 sequences differ" in done.err
    done = everything("compare", "everything", "later")
    assert done.status == 2
    assert "h2o, tova" in done.two_lines()[1]


def test_too_few_sequences_are_said(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "h2o", "--policy", "tova", "--budget", "50%", "-q").status == 0
    done = run("compare", "--quiet")
    assert done.status == 0, done.err
    assert done.err == "warning: 1 sequence: p cannot go below 1; 6 or more are needed for p <= 0.05\n"


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["-p", "h2o"], "compare needs the names of two policies", "h2o, tova"),
        (["-p", "h2o", "-p", "h20"], "'h20'", "h2o"),
        (["-p", "h2o", "-p", "tova", "-p", "h2o"], "3 policies", "--policy A --policy B"),
        (["--metric", "retained_mas"], "'retained_mas'", "retained_mass"),
        (["everything", "everything", "everything"], "3 replays", "one replay or two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_compare_refuses(everything: Run, arguments: list[str], what: str, todo: str) -> None:
    done = everything("compare", *arguments)
    assert done.status == 2
    assert what in done.two_lines()[0]
    assert todo in done.two_lines()[1]
    assert done.out == ""


def test_where_nothing_was_evicted(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "full", "--policy", "tova", "--budget", "50%", "-q").status == 0
    done = run("compare")
    assert done.status == 0, done.err
    assert "nothing to compare" in done.out


@pytest.mark.parametrize("command", ["export", "compare"])
def test_an_empty_folder(run: Run, command: str) -> None:
    done = run(command)
    assert done.status == 1
    assert "no complete replay" in done.two_lines()[0]
    assert not list(Path().iterdir())


def test_a_table_for_a_paper(everything: Run) -> None:
    done = everything("export", "everything", "--format", "markdown")
    assert done.status == 0, done.err
    assert done.out.startswith("| policy | budget | loop | ") and done.out.count("\n| h2o | ") == 2
    assert "**" in done.out
    assert everything("export", "everything", "--format", "latex", "-o", "table.tex").status == 0
    assert "\\toprule" in Path("table.tex").read_text()
    refused = everything("export", "everything", "--format", "latex", "-o", "table.tex")
    assert refused.status == 1 and "--force" in refused.two_lines()[1]


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["--to", "comet"], "'comet'", "kvscope export --help"),
        (["--to", "wandb", "--format", "csv"], "--format, --per and --long apply to tables", "Omit them"),
        (["--to", "mlflow", "--per", "head"], "--format, --per and --long apply to tables", "Omit them"),
        (["--to", "tensorboard", "--long"], "--format, --per and --long apply to tables", "Omit them"),
        (["--to", "tensorboard", "-o", ""], "-o is empty", "-o NAME"),
    ],
)
def test_trackers_refuse(everything: Run, arguments: list[str], what: str, todo: str) -> None:
    done = everything("export", "everything", *arguments)
    assert done.status == 2
    assert what in done.two_lines()[0]
    assert todo in done.two_lines()[1]
    assert [path.name for path in Path("reports").iterdir()] == ["everything"]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed(everything: Run, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    for module in (tracker, f"{tracker}.exceptions", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    done = everything("export", "everything", "--to", tracker)
    assert done.status == 1
    assert f"an export to {tracker} needs the package" in done.two_lines()[0]
    assert f'pip install "kvscope[{tracker}]"' in done.two_lines()[1]
    assert [path.name for path in Path("reports").iterdir()] == ["everything"]
