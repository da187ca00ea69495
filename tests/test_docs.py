"""The documentation tells the truth, and the check that says so can see a lie."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvscope.core.residency import ResidencyIntervals
from tests.test_house import MAY_IMPORT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    found = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_documentation_is_true(docs: ModuleType) -> None:
    assert list(docs.problems()) == []


def test_a_picture_has_a_cell_for_each_step_that_a_key_is_held(docs: ModuleType) -> None:
    columns = {"kv_head": [0, 0, 1], "key": [0, 2, 1], "enter": [0, 2, 1], "leave": [3, 4, 2]}
    made = {name: np.array(values, np.int32) for name, values in columns.items()}
    drawn = docs.policy_pages._svg(ResidencyIntervals.of(**made, heads=2, length=4), 3, "a<b")
    assert 'd="M0 0h3v9h-3zM6 6h3v6h-3z"' in drawn, "key 0 of steps 0 to 2, key 2 of steps 2 and 3, head 0 alone"
    assert "<title>a&lt;b:" in drawn and "M0 9H12" in drawn


def test_the_page_of_a_policy_names_the_code_that_was_run(docs: ModuleType) -> None:
    page = docs.generated()["docs/policies/keyformer.md"]
    assert "d-matrix-ai/keyformer-llm@" in page and "![" in page and "softmax((x_t + g_t) / tau)" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nkvscope retrace x\n```", "no command retrace"),
        ("```sh\nkvscope replay --alpah 1\n```", "no option --alpah"),
        ("see `kvscope info --depth`", "no option --depth"),
    ],
)
def test_the_check_sees_wrong_commands(docs: ModuleType, text: str, said: str) -> None:
    (line,) = docs._commands(text)
    assert said in line


def test_the_check_sees_broken_links(docs: ModuleType) -> None:
    (line,) = docs.doc_links.broken(ROOT / "README.md", "[a](nowhere.md) [b](LICENSE) [c](https://example.org)")
    assert "nowhere.md" in line


def test_the_check_sees_links_to_headings_that_are_not_there(docs: ModuleType) -> None:
    text = "## One, two\n```sh\n## three\n[a](no.md)\n```\n[a](#one-two) [b](#three) [c](docs/glossary.md#glossary)"
    (line,) = docs.doc_links.broken(ROOT / "README.md", text)
    assert "#three" in line


@pytest.mark.parametrize("name", ["docs/outcomes.md", "docs/gates.md", "docs/gpu.md", "docs/speed.md"])
def test_a_wrong_table_is_corrected(docs: ModuleType, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    row = page.partition("<!-- /")[0].rstrip().rpartition("\n")[2]
    assert row.startswith("| ")
    assert docs.with_tables(name, page) == page
    assert docs.with_tables(name, page.replace(row, "| wrong |")) == page


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 8000


def test_readme_says_what_a_trace_is_in_its_first_paragraph() -> None:
    first = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert "attention" in first
    assert "not the block hashes" in first


def test_the_table_of_rooms_is_the_one_that_the_tests_enforce() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", page, re.MULTILINE)
    stated = {room: set(re.findall(r"`(\w+)`", others)) for room, others in rows}
    enforced = {room: others - {"core"} for room, others in MAY_IMPORT.items() if not room.startswith("__")}
    assert stated == enforced


TERMS = """
    allocation; attend; attention mass; baseline; belady; budget, cache size; closed loop; evict; fallback;
    full prefill, stream prefill; gate; hold; ideal; kind; kv head; lag; late mass; live row; open loop;
    phase, `--compress`; query position; reference; regret; replay; residency interval; retain;
    retained mass; run; scope; sinks; span; sparse reader; step; trace; visible
"""


def test_the_glossary_explains_every_term_in_alphabetical_order() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE))
    rows.pop("term")
    assert {" ".join(term.split()) for term in TERMS.split(";")} <= set(rows)
    assert list(rows) == sorted(rows, key=str.lower)
    assert all(len(meaning) > 3 for meaning in rows.values())
