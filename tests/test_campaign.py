"""Nothing damaged is accepted: a sample of the campaign in tools/campaign.py, and that the campaign would notice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tools import campaign, mutations
from tools.campaign_subjects import make_subjects

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_sample_of_damaged_files_is_refused_or_read_as_before() -> None:
    found = campaign.campaign(150, seed=7)
    assert len(found) == 150
    assert [case for case in found if case.outcome in campaign.BAD] == []
    assert sum(case.outcome == "refused" for case in found) > 100


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mutations.Subject]:
    return make_subjects(tmp_path_factory.mktemp("subjects") / "s", ROOT)


@pytest.mark.parametrize("name", ["example", "qkv", "topk", "committed", "replay"])
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda each: each.__name__)
def test_every_mutation_of_every_folder(
    name: str, mutation: mutations.Mutation, known: dict[str, mutations.Subject], tmp_path: Path
) -> None:
    subject = known[name]
    mutations.copied(subject, tmp_path / "case")
    assert mutation(random.Random(3), subject, tmp_path / "case")
    assert {file.read_bytes() for file in subject.source.rglob("*.json")}, "the source is left as it is"


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda path: "something else", "WRONG: accepted with another result"),
        (lambda path: 1 // 0, "traceback"),
        (lambda path: "known", "same result"),
    ],
)
def test_what_is_wrong_is_noticed(
    read: object, outcome: str, known: dict[str, mutations.Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(campaign.READERS, "run.json", read)
    case = campaign.run_case(1, 0, {"replay": known["replay"]}, {"replay": "known"}, tmp_path / "case")
    assert case.outcome == outcome
