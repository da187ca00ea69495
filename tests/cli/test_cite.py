"""``kvscope policies --cite``: what to cite for named policies, for all, and for those of a replay."""

import json
from pathlib import Path

import pytest

from kvscope.policies.citation import bibtex
from kvscope.policies.cited import cited_by_all
from tests.cli.conftest import Run
from tests.policies.test_citations import KEYS, parse


def test_named_policies_and_all(run: Run) -> None:
    done = run("policies", "--cite", "a2sf:alpha=0.7", "h2o:variant=mask", "full")
    assert done.status == 0, done.err
    assert set(parse(done.out)) == {"jo2024a2sf", "zhang2023h2o"}
    assert "without a publication: full" in done.err
    done = run("policies", "--cite")
    assert done.status == 0, done.err
    assert set(parse(done.out)) >= set(KEYS.values())
    assert done.out == bibtex(one.citation for one in cited_by_all() if one.citation is not None)
    rows = {row["policy"]: row["citation"] for row in json.loads(run("policies", "--cite", "--json").out)}
    assert rows["full"] is None and rows["tova"]["arxiv"] == "2401.06104"


def test_exactly_the_policies_of_a_replay(run: Run, small: Path) -> None:
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom kvscope.policies import Policy\n\n\n"
        '@dataclass(frozen=True)\nclass Oldest(Policy):\n    """Retain the oldest keys."""\n\n'
        "    needs = frozenset()\n\n"
        "    def observe(self, step, score):\n        score[..., -1] = -step.t\n        return score\n"
    )
    policies = [part for name in ("h2o:recent=2", "h2o", "a2sf", "full", "mine.py:Oldest") for part in ("-p", name)]
    assert run("replay", *policies, "--budget", "30%,50%", "-o", "mine", "-q").status == 0
    done = run("policies", "--cite", "--replay", "mine")
    assert done.status == 0, done.err
    assert set(parse(done.out)) == {"zhang2023h2o", "jo2024a2sf"}
    assert "not cited, because they are not installed: Oldest" in done.err
    assert run("replay", "-p", "tova", "--allocate", "pyramid", "-o", "shared", "-q").status == 0
    done = run("policies", "--cite", "--replay", "reports/shared")
    assert set(parse(done.out)) == {"oren2024tova", "cai2024pyramidkv"}, "the rule of the allocation is in the label"


@pytest.mark.parametrize(
    ("arguments", "status", "what", "todo"),
    [
        (["--cite", "h20"], 2, "'h20'", "h2o"),
        (["--cite", "h2o:recnt=1"], 2, "'recnt'", "recent"),
        (["--cite", "--replay", "nothing"], 1, "nothing", "kvscope replay"),
        (["--replay", "nothing"], 2, "--replay is only for --cite", "--cite --replay"),
        (["--cite", "h2o", "--replay", "nothing"], 2, "exclude each other", "--cite --replay"),
    ],
)
def test_refusals(run: Run, arguments: list[str], status: int, what: str, todo: str) -> None:
    done = run("policies", *arguments)
    assert done.status == status
    first, second = done.two_lines()
    assert what in first and todo in second
    assert done.out == ""


def test_several_policies_are_described(run: Run) -> None:
    assert [row["name"] for row in json.loads(run("policies", "tova", "h2o", "tova", "--json").out)] == ["tova", "h2o"]
    assert json.loads(run("policies", "tova", "--json").out)["name"] == "tova"
    shown = run("policies", "tova", "h2o").out
    assert "2401.06104" in shown and "2306.14048" in shown
