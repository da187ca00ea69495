"""The commands one after another, as a user types them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from kvscope.core.seal import sealed
from kvscope.policies import POLICIES
from tests.cli.conftest import LENGTH, PROMPT, Run, maps
from tests.own_code import forget_members, forget_modules
from tests.trace.layers import record as record_layers

ROOT = Path(__file__).parent.parent.parent


LINES = [
    "kvscope trace --model llama2-7b prompt.txt",
    "kvscope replay --policy a2sf --alpha 0.7",
    "kvscope report",
    "kvscope diff OLD NEW",
]


def test_the_readme_shows_the_four_lines() -> None:
    assert "```sh\n" + "\n".join(LINES) + "\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_four_lines(run: Run) -> None:
    Path("prompt.txt").write_text(
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
        "once or twice she had peeped into the book her sister was reading, but it had no pictures."
    )
    trace, replay, report, diff = (shlex.split(line)[1:] for line in LINES)
    done = run(*["demo" if word == "llama2-7b" else word for word in trace])  # the bundled model needs no network
    assert done.status == 0, done.err
    assert Path("traces/prompt-demo/trace.json").is_file()

    done = run(*replay)
    assert done.status == 0, done.err
    assert "traces/prompt-demo" in done.err, "what was taken is said"
    assert "20%" in done.err
    run_json = json.loads(Path("reports/prompt-demo-a2sf/run.json").read_text())
    assert run_json["runs"][0]["params"]["alpha"] == 0.7
    assert run_json["runs"][0]["budget"] == "20%"
    assert run_json["runs"][0]["prefill"] == "full"
    assert run_json["command"] == "kvscope replay --policy a2sf --alpha 0.7"

    done = run(*report)
    assert done.status == 0, done.err
    assert done.out.strip() == "reports/prompt-demo-a2sf.html"
    assert "reports/prompt-demo-a2sf" in done.err
    assert Path("reports/prompt-demo-a2sf.html").stat().st_size > 10_000

    for name in ("OLD", "NEW"):
        assert run("replay", "--policy", "a2sf", "-o", name).status == 0
    done = run(*diff)
    assert done.status == 0, done.err


def test_a_second_run_takes_a_second_name(run: Run, small: Path) -> None:
    for _ in range(2):
        assert run("replay", "--policy", "a2sf", "-q").status == 0
    assert {path.name for path in Path("reports").iterdir()} == {"small-a2sf", "small-a2sf-2"}


def test_every_policy_and_several_budgets(run: Run, small: Path) -> None:
    done = run(
        "replay",
        "--policy",
        "all",
        "--budget",
        "40%,60%",
        "--budget",
        "6",
        "--prefill",
        "stream",
        "--json",
        "-q",
    )
    assert done.status == 0, done.err
    summary = json.loads(done.out)
    from kvscope.policies import POLICIES

    replayed = {row["policy"] for row in summary["runs"]}
    (line,) = done.err.splitlines()
    assert line.startswith("warning: skipped: ")
    named = set(re.findall(r"[a-z][a-z0-9-]+", line))
    assert set(POLICIES.names()) - replayed <= named and not (replayed & named - {"keys", "full"})
    assert {"full", "window", "h2o", "tova", "a2sf", "scissorhands"} <= replayed
    assert re.search(r"keydiff.* \(needs keys\)", line), line
    assert re.search(r"snapkv.* \(is not defined for stream prefill\)", line), line
    assert line.endswith(
        "Record the trace again with --hidden --store maps+vectors --outputs --reread to include more of them."
    )
    assert {row["budget"] for row in summary["runs"] if row["policy"] == "tova"} == {"40%", "60%", "6"}
    assert {row["prefill"] for row in summary["runs"]} == {"stream"}
    assert Path("reports/small-all/summary.json").is_file()


def test_the_table_of_a_replay(run: Run, small: Path) -> None:
    done = run("replay", "--policy", "full", "--policy", "tova", "--budget", "40%")
    assert done.status == 0, done.err
    assert "tova" in done.out
    assert "full prefill" in done.out
    assert "open loop" in done.out
    assert "nothing was evicted" in done.out


def test_diff_finds_a_regression(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "a2sf", "--budget", "50%", "-o", "old", "-q").status == 0
    assert run("replay", "--policy", "a2sf", "--budget", "50%", "-o", "new", "-q").status == 0
    file = Path("reports/new/summary.json")
    worse = json.loads(file.read_text())
    worse["runs"][0]["metrics"]["retained_mass"]["mean"] -= 0.05
    Path("worse.json").write_text(json.dumps(worse))
    assert run("diff", "old", "worse.json").status == 1, "it was changed by hand"
    Path("worse.json").write_text(json.dumps(sealed(worse)))

    assert run("diff", "old", "new").status == 0
    done = run("diff", "old", "worse.json")
    assert done.status == 3
    assert "retained_mass" in done.out
    assert run("diff", "old", "worse.json", "--tolerance", "0.1").status == 0
    assert run("diff", "old", "worse.json", "--tolerance", "retained_mass=0.06").status == 0
    assert run("diff", "old", "worse.json", "--tolerance", "ideal_cosine=0.06").status == 3
    told = json.loads(run("diff", "old", "worse.json", "--json").out)
    assert told["regressed"] is True
    assert [row["metric"] for row in told["rows"] if row["verdict"] == "worse"] == ["retained_mass"]


def test_diff_names_a_run_that_one_side_lacks_in_one_line(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "h2o", "--policy", "window", "--budget", "50%", "-o", "two", "-q").status == 0
    assert run("replay", "--policy", "h2o", "--budget", "50%", "-o", "one", "-q").status == 0
    for pair, verdict in ((("two", "one"), "missing"), (("one", "two"), "new")):
        short, whole = run("diff", *pair).out, run("diff", *pair, "--all").out
        (line,) = [line for line in short.splitlines() if line.rstrip().endswith(f" {verdict}")]
        listed = [line for line in whole.splitlines() if line.rstrip().endswith(f" {verdict}")]
        assert line.split()[:2] == ["window", "50%"] and f" all {len(listed)} " in line and len(listed) > 5
        assert whole.count("retained_mass ") == 2, "of both runs"


def test_diff_of_different_traces_is_an_error(run: Run, small: Path) -> None:
    np.savez("other.npz", attention=maps(seed=1))
    assert run("import", "other.npz", "--prompt-length", str(PROMPT), "-q").status == 0
    assert run("replay", "small", "--policy", "a2sf", "--budget", "50%", "-o", "old", "-q").status == 0
    assert run("replay", "other", "--policy", "a2sf", "--budget", "50%", "-o", "new", "-q").status == 0
    done = run("diff", "old", "new")
    assert done.status == 1
    assert "different traces" in done.two_lines()[0]
    assert done.out == ""


def test_info(run: Run, small: Path) -> None:
    told = json.loads(run("info", "small", "--json").out)
    assert told["sequences"] == [{"prompt": PROMPT, "length": LENGTH, "forced": told["sequences"][0]["forced"]}]
    assert (told["heads"], told["layers"], told["whole"], told["verified"]) == (4, [0, 1], True, False)
    assert told["bytes"] == sum(file.stat().st_size for file in small.rglob("*") if file.is_file())
    table = run("info", "small").out
    assert f"{PROMPT} + {LENGTH - PROMPT}" in table
    assert "traces/small" in table
    assert told["layer_heads"] == []


def test_info_names_the_heads_of_each_layer(run: Run) -> None:
    record_layers(Path("traces/layers"))
    told = json.loads(run("info", "layers", "--json").out)
    assert told["layer_heads"][1] == {"heads": 6, "kv_heads": 3, "head_dim": 3}
    said = " ".join(run("info", "layers").out.split())
    assert "6 layers; layers 0, 2: 4 query heads, 2 key/value heads of size 3; layers 1, 3: 6" in said


def test_policies(run: Run) -> None:
    rows = {row["name"]: row for row in json.loads(run("policies", "--json").out)}
    assert {"full", "random", "window", "streaming-llm", "h2o", "tova", "a2sf"} <= set(rows)
    assert rows["a2sf"]["parameters"][0]["name"] == "alpha"
    table = run("policies").out
    assert all(name in table for name in rows)
    one = run("policies", "a2sf").out
    assert "--alpha" in one
    assert "2407.20485" in one
    assert "\n>>> held(" in one and "---" not in one, "an example is lines of code, its heading no rule of dashes"
    assert "no parameters" in run("policies", "full").out


def test_the_policy_of_the_documentation(run: Run, small: Path) -> None:
    text = (ROOT / "docs" / "own_policy.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n# (mine\.py)\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert len(code[2].strip().splitlines()) <= 22
    Path(code[1]).write_text(code[2])
    command = re.search(r"^kvscope (replay --policy mine\.py.*)$", text, re.MULTILINE)
    assert command is not None
    done = run(*command[1].split(), "--budget", "50%", "-o", "mine")
    assert done.status == 0, done.err
    runs = json.loads(Path("reports/mine/run.json").read_text())["runs"]
    assert [row["policy"] for row in runs] == ["fading-max", "h2o"]
    assert runs[0]["params"]["fade"] == 0.8


def test_a_report_whose_trace_is_gone_says_so(run: Run, small: Path) -> None:
    assert run("replay", "--policy", "a2sf", "-o", "mine", "-q").status == 0
    small.rename("traces/moved")
    done = run("report", "mine")
    assert done.status == 0, done.err
    assert "warning" in done.err


def test_several_replays_in_one_report(run: Run, small: Path) -> None:
    for policy in ("a2sf", "tova"):
        assert run("replay", "--policy", policy, "-o", policy, "-q").status == 0
    done = run("report", "a2sf", "tova", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out) == {
        "report": "reports/a2sf+tova.html",
        "replays": ["reports/a2sf", "reports/tova"],
    }


def test_quiet_leaves_stderr_empty(run: Run, small: Path) -> None:
    for command in (["info"], ["replay", "--policy", "a2sf"], ["report"]):
        done = run(*command, "--quiet")
        assert done.status == 0, done.err
        assert done.err == ""


@pytest.mark.parametrize("width", [100, 80])
def test_tables_fit_the_terminal(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (
        ["policies"],
        ["policies", "a2sf"],
        ["info"],
        ["replay", "--policy", "all", "--budget", "60%"],
    ):
        out = run(*command).out
        assert max(map(len, out.splitlines())) <= width, command


def test_demo(run: Run) -> None:
    done = run("demo")
    assert done.status == 0, done.err
    page = re.search(r"report: (\S+\.html)", done.out)
    assert page is not None
    assert Path(page[1]).is_file()
    assert "next: kvscope replay --policy h2o --policy tova" in done.err
    assert run("replay", "--policy", "h2o", "--policy", "tova").status == 0, "the suggested command runs"
    summary = json.loads(Path("reports/demo/summary.json").read_text())
    assert {row["budget"] for row in summary["runs"] if row["policy"] == "a2sf"} == {"10%", "20%", "40%"}
    trace = json.loads(next(Path("traces").glob("*/trace.json")).read_text())
    (sequence,) = trace["sequences"]
    assert sequence["prompt"] >= 512
    assert sequence["length"] - sequence["prompt"] == 128


def test_a_policy_of_a_file_is_forgotten_between_tests(run: Run, small: Path) -> None:
    imports = "from dataclasses import dataclass\nfrom kvscope import policy\nfrom kvscope.policies.h2o import H2O\n"
    heading = '@policy("mine")\n@dataclass(frozen=True)\n'
    Path("mine.py").write_text(f'{imports}{heading}class Mine(H2O):\n    """A policy of a test."""\n')
    assert run("replay", "--policy", "mine.py:Mine", "--budget", "50%", "-o", "mine").status == 0
    assert "mine" in POLICIES.names()
    assert forget_modules()
    forget_members()
    assert "mine" not in POLICIES.names()
    assert "h2o" in POLICIES.names()
