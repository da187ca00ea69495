"""``kvscope run``: what it prints, where results go, and what is refused in two lines."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

TEXT = (
    "model: demo\ntasks: 'needle:wording=notes'\nlengths: 64\nexamples: 2\nmax_new_tokens: 4\n"
    "policies: [h2o, tova]\nbudgets: 50%\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def test_an_experiment_from_its_file_to_its_page(run: Run, file: Path) -> None:
    done = run("run", file)
    assert done.status == 0, done.err
    assert "Best at 50%:" in done.out and "h2o" in done.out and "tova" in done.out
    assert "report: reports/mine.html" in done.err
    assert sorted(path.name for path in Path("reports").iterdir()) == ["cells", "mine.html", "mine.json"]
    again = run("run", file, "--json", "--quiet")
    printed = json.loads(again.out)
    assert printed["kind"] == "kvscope-experiment" and printed["failed"] == []
    assert {row["policy"] for row in printed["runs"]} == {"h2o", "tova"}
    cell = printed["replays"][0]
    assert run("info", f"cells/{cell}", "--quiet").status == 0
    assert run("report", f"cells/{cell}", "-o", "one", "--quiet").status == 0, "a cell is a replay like any other"


def test_a_dry_run_counts_and_writes_nothing(run: Run, file: Path) -> None:
    done = run("run", file, "--dry-run", "--json")
    assert done.status == 0, done.err
    plan = json.loads(done.out)
    assert (plan["traces"], plan["traces_to_do"], plan["runs"], plan["runs_to_do"]) == (1, 1, 2, 2)
    assert plan["seconds"] > 0 and plan["trace_bytes"] > 1000
    assert sorted(path.name for path in Path().iterdir()) == ["mine.yaml"]
    written = run("run", file, "--quiet")
    assert written.status == 0, written.err
    (trace,) = (path for path in Path("traces/cells").iterdir() if path.is_dir())
    size = sum(item.stat().st_size for item in trace.rglob("*") if item.is_file())
    assert 0.4 < plan["trace_bytes"] / size < 2.5
    plan = json.loads(run("run", file, "--dry-run", "--json").out)
    assert (plan["traces_to_do"], plan["runs_to_do"], plan["seconds"], plan["trace_bytes"]) == (0, 0, 0, 0)
    assert "1, of which 1 are done" in run("run", file, "--dry-run").out


def test_the_name_of_the_results_is_that_of_the_option(run: Run, file: Path) -> None:
    assert run("run", file, "-o", "other", "--quiet").status == 0
    assert Path("reports/other.json").is_file() and not Path("reports/mine.json").exists()


def test_what_failed_is_named_and_the_status_is_1(run: Run, file: Path) -> None:
    file.write_text(TEXT.replace("[h2o, tova]", "[h2o, quest]"))
    done = run("run", file, "--quiet")
    assert done.status == 1
    what, todo = done.two_lines()
    assert what.startswith("quest at 50%: replay of demo") and "needs keys" in what and "--store" in todo
    assert [row["policy"] for row in json.loads(Path("reports/mine.json").read_text())["runs"]] == ["h2o"]


def test_another_file_is_not_replaced(run: Run, file: Path) -> None:
    Path("reports").mkdir()
    Path("reports/mine.html").write_text("my own page")
    what, _ = run("run", file).two_lines()
    assert "reports/mine.html" in what and not Path("traces").exists(), "it is checked first"
    Path("reports/mine.html").unlink()
    Path("reports/mine.json").write_text("{}")
    what, _ = run("run", file).two_lines()
    assert "reports/mine.json" in what and Path("reports/mine.json").read_text() == "{}"
    assert run("run", file, "--force", "--quiet").status == 0


@pytest.mark.parametrize(
    ("text", "what", "status"),
    [
        (TEXT + "policie: h2o\n", "unknown key 'policie'", 2),
        (TEXT.replace("demo", "dem0"), "no model is called 'dem0'", 2),
        (TEXT.replace("demo", "nobody/nothing"), "nobody/nothing", 1),
        (TEXT + "prompts: nowhere.txt\n", "cannot read nowhere.txt", 2),
        (TEXT + "device: cuda:7\n", "cuda:7", 2),
    ],
)
def test_what_cannot_run_is_refused(run: Run, file: Path, text: str, what: str, status: int) -> None:
    file.write_text(text)
    done = run("run", file)
    assert done.status == status and what in done.two_lines()[0]
    assert not Path("reports").exists() or not list(Path("reports").glob("*.html"))


def test_a_file_that_is_not_there(run: Run) -> None:
    what, _ = run("run", "nowhere.yaml").two_lines()
    assert "nowhere.yaml" in what
