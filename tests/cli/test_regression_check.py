"""The CI regression check finds an off-by-one in a policy, and reports nothing else."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest
import yaml

from kvscope.cli.app import run as run_command
from kvscope.core.seal import sealed
from tests.cli.conftest import Result, Run

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "traces" / "example"
WORKFLOW = ROOT / ".github" / "workflows" / "fidelity.yml"
BASELINE = "tests/data/baseline.json"

POLICY = """
from dataclasses import dataclass
from kvscope import Policy, Protection, parameter

@dataclass(frozen=True)
class Recent(Policy):
    '''Heavy keys, and the newest ones.'''
    recent: int = parameter(8, "newest keys that stay")
    def protect(self, budget):
        return Protection(recent=self.recent{slip})
    def observe(self, step, score):
        return score + step.weights()
"""

# What a build would have if somebody wrote `recent` one too small: loaded by every Python that starts.
PLANTED = """
from dataclasses import replace
from kvscope.policies.h2o import H2O

intended = H2O.protect
H2O.protect = lambda self, budget: replace(intended(self, budget), recent=intended(self, budget).recent - 1)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two replays of a user's policy: as it was, and with one protected key fewer."""
    folder = tmp_path_factory.mktemp("regression")
    shutil.copytree(EXAMPLE, folder / "traces" / "example")
    with contextlib.chdir(folder):
        for name, slip in (("before", ""), ("after", " - 1")):
            file = Path(f"{name}.py")
            file.write_text(POLICY.format(slip=slip))
            assert run_command(["replay", "--policy", f"{file}:Recent", "--budget", "25%", "-o", name, "-q"]) == 0
    return folder


@pytest.fixture
def replays(run: Run, made: Path) -> Run:
    """The command line in a copy of that folder."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)
    return run


def test_one_protected_key_fewer_is_caught_by_the_metrics(replays: Run) -> None:
    done = replays("diff", "before", "after")
    assert done.status == 3
    assert re.search(r"retained_mass .*worse", done.out)
    assert replays("diff", "before", "before").status == 0


def test_one_protected_key_fewer_is_caught_by_the_decisions(replays: Run) -> None:
    assert replays("diff", "before", "after", "-t", "1").status == 0, "so wide a tolerance sees nothing"
    done = replays("diff", "before", "after", "-t", "1", "--decisions", "--json")
    assert done.status == 3
    (decided,) = json.loads(done.out)["decisions"]
    assert 0 < decided["changed"] < decided["stays"]
    assert len(decided["first"]) == 10
    prompt = json.loads((EXAMPLE / "trace.json").read_text())["sequences"][0]["prompt"]
    assert decided["first"][0]["step"] == prompt - 1, "the first eviction, at the end of the prompt, is already another"
    told = replays("diff", "before", "after", "-t", "1", "--decisions", "--first", "2")
    assert told.status == 3
    assert f"{decided['changed']:,} of {decided['stays']:,} residency intervals differ; the earliest 2" in told.out
    assert len(re.findall("evicted at", told.out)) >= 2
    assert replays("diff", "before", "before", "--decisions").status == 0


def test_a_committed_summary_catches_it_without_the_folder(replays: Run) -> None:
    assert replays("diff", "baseline.json", "before", "--update").status == 0
    shutil.rmtree("reports/before")
    done = replays("diff", "baseline.json", "after", "-t", "1", "--decisions")
    assert done.status == 3
    assert "has only a summary" in done.out


def test_update_accepts_the_new_side(replays: Run) -> None:
    done = replays("diff", "sub/baseline.json", "before", "--update")
    assert done.status == 0, done.err
    assert "sub/baseline.json is written" in done.err
    assert Path("sub/baseline.json").read_bytes() == Path("reports/before/summary.json").read_bytes()
    assert replays("diff", "sub/baseline.json", "after").status == 3
    done = replays("diff", "sub/baseline.json", "after", "--decisions", "--update")
    assert done.status == 0
    assert "worse" in done.out, "what is accepted is shown"
    assert Path("sub/baseline.json").read_bytes() == Path("reports/after/summary.json").read_bytes()
    assert list(Path("sub").iterdir()) == [Path("sub/baseline.json")]
    assert replays("diff", "sub/baseline.json", "after", "--decisions").status == 0


def test_update_changes_nothing_where_it_must_not(replays: Run) -> None:
    before = Path("reports/before/summary.json").read_bytes()
    done = replays("diff", "before", "after", "--update")
    assert done.status == 2
    assert "replays are never modified" in done.two_lines()[0]
    done = replays("diff", "reports/before/summary.json", "after", "--update")
    assert done.status == 2
    assert "belongs to a replay" in done.two_lines()[0]
    foreign = json.loads(before)
    foreign["trace"]["identity"] = "0" * 64
    foreign = sealed(foreign)
    Path("baseline.json").write_text(json.dumps(foreign))
    done = replays("diff", "baseline.json", "after", "--update")
    assert done.status == 1
    assert "different traces" in done.two_lines()[0]
    assert "remove baseline.json" in done.two_lines()[1]
    assert json.loads(Path("baseline.json").read_text()) == foreign
    assert Path("reports/before/summary.json").read_bytes() == before
    Path("sub.json").mkdir()
    for base in ("sub.json", "sub.json/none/base.txt"):
        assert replays("diff", base, "after", "--update").status in (1, 2)


def test_formats(replays: Run) -> None:
    arguments = ("diff", "before", "after", "--decisions", "--format")
    done = replays(*arguments, "junit")
    assert done.status == 3
    failed = {case.get("name") for case in xml.fromstring(done.out.encode()).iter("testcase") if len(case)}
    assert {"retained_mass", "decisions"} <= failed
    assert "Decisions differ in 1 of 1 runs." in done.err, "whoever reads the log sees the verdict"
    assert replays(*arguments, "junit", "-q").err == ""
    done = replays(*arguments, "markdown")
    assert done.status == 3
    assert done.out.startswith("### kvscope: regression")
    assert json.loads(replays(*arguments, "json").out) == json.loads(replays(*arguments[:-1], "--json").out)
    done = replays(*arguments, "junit", "--json")
    assert done.status == 2
    assert "--json and --format junit" in done.two_lines()[0]


def test_a_relative_tolerance(replays: Run) -> None:
    assert replays("diff", "before", "after", "-t", "100%").status == 0
    assert replays("diff", "before", "after", "-t", "100%", "-t", "ideal_recall=0%").status == 3
    assert "not a number" in replays("diff", "before", "after", "-t", "ideal_recall=1%%").two_lines()[0]


def test_the_summary_page_of_a_job(replays: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "page.md")
    Path("page.md").write_text("# before\n")
    assert replays("diff", "before", "after", "--decisions").status == 3
    assert replays("diff", "before", "before", "--format", "junit").status == 0
    page = Path("page.md").read_text()
    assert page.startswith("# before\n### kvscope: regression\n")
    assert page.count("\n### kvscope: no regression\n") == 1
    assert "| sequence | layer |" in page
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "no/such/folder/page.md")
    done = replays("diff", "before", "after")
    assert done.status == 1, "a page that cannot be written is an error, not silence"
    assert "worse" in done.out


def steps() -> tuple[dict[str, str], list[str]]:
    """Return the environment of the workflow, and its steps that run kvscope."""
    workflow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = workflow["jobs"].values()
    return workflow["env"], [step["run"] for step in job["steps"] if "kvscope " in step.get("run", "")]


def run_workflow(folder: Path, *, planted: bool) -> Result:
    """Run those steps as a build does: bash, in a fresh checkout, up to the first that fails."""
    checkout = folder / ("planted" if planted else "clean")
    shutil.copytree(EXAMPLE, checkout / "traces" / "example")
    (checkout / BASELINE).parent.mkdir(parents=True)
    shutil.copy(ROOT / BASELINE, checkout / BASELINE)
    variables, scripts = steps()
    environment = os.environ | variables | {"GITHUB_STEP_SUMMARY": str(checkout / "page.md")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    if planted:
        (checkout / "plant").mkdir()
        (checkout / "plant" / "sitecustomize.py").write_text(PLANTED)
        environment["PYTHONPATH"] = str(checkout / "plant")
    for script in scripts:
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            break
    file = checkout / "fidelity.xml"
    return Result(done.returncode, file.read_text() if file.exists() else "", done.stderr)


def test_the_workflow_passes_as_it_is(tmp_path: Path) -> None:
    """What to do where decisions or the example changed on purpose is in CONTRIBUTING.md."""
    done = run_workflow(tmp_path, planted=False)
    assert done.status == 0, done.err + done.out
    cases = list(xml.fromstring(done.out.encode()).iter("testcase"))
    assert sum(case.get("name") == "decisions" for case in cases) == 8
    assert "### kvscope: no regression" in (tmp_path / "clean" / "page.md").read_text()


def test_the_workflow_fails_with_a_slip_in_a_policy(tmp_path: Path) -> None:
    done = run_workflow(tmp_path, planted=True)
    assert done.status == 3, done.err
    failed = [case for case in xml.fromstring(done.out.encode()).iter("testcase") if len(case)]
    assert {case.get("classname", "").split()[0] for case in failed} == {"h2o"}
    assert {"decisions", "retained_mass"} <= {case.get("name") for case in failed}
    assert "### kvscope: regression" in (tmp_path / "planted" / "page.md").read_text()


def test_the_workflow_uses_what_is_there() -> None:
    variables, scripts = steps()
    assert len(scripts) == 2
    assert (ROOT / variables["TRACE"]).is_dir()
    assert variables["BASELINE"] == BASELINE
    assert ".github/workflows/fidelity.yml" in (ROOT / "docs" / "ci.md").read_text()
