"""What to cite for a policy: complete, the same in every version, and BibTeX that a strict parser reads."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.policies import POLICIES
from kvscope.policies.citation import Citation, bibtex
from kvscope.policies.cited import Source, cited_by, cited_by_all, cited_in
from kvscope.policies.spec import parse_policies

# Papers cite these keys: they must not change.
KEYS = {
    "a2sf": "jo2024a2sf",
    "ada-kv": "feng2025adakv",
    "attention-gate": "zeng2024attentiongate",
    "belady": "belady1966study",
    "cake": "qin2025cake",
    "chunkkv": "liu2025chunkkv",
    "compactor": "chari2025compactor",
    "criticalkv": "feng2025criticalkv",
    "curdkv": "sengupta2025curdkv",
    "dms": "lancucki2025dms",
    "duo-attention": "xiao2025duoattention",
    "expected-attention": "devoto2025expectedattention",
    "fastgen": "ge2023fastgen",
    "finch": "corallo2024finch",
    "h2o": "zhang2023h2o",
    "headkv": "fu2025headkv",
    "ideal": "jo2024a2sf",
    "indexer": "deepseek2025v32",
    "key-norm": "devoto2024l2norm",
    "keydiff": "park2025keydiff",
    "keyformer": "adnan2024keyformer",
    "kvzap": "jeblick2026kvzap",
    "kvzip": "kim2025kvzip",
    "lacache": "shi2025lacache",
    "lagkv": "liang2025lagkv",
    "morphkv": "ghadia2025morphkv",
    "pyramidinfer": "yang2024pyramidinfer",
    "pyramidkv": "cai2024pyramidkv",
    "q-filters": "godey2025qfilters",
    "quest": "tang2024quest",
    "r-kv": "cai2025rkv",
    "raas": "hu2025raas",
    "recycled-attention": "xu2024recycled",
    "refreshkv": "xu2025refreshkv",
    "roco": "ren2024efficacy",
    "scissorhands": "liu2023scissorhands",
    "simlayerkv": "zhang2024simlayerkv",
    "snapkv": "li2024snapkv",
    "streaming-llm": "xiao2024streamingllm",
    "tova": "oren2024tova",
    "vatp": "guo2024vatp",
    "window": "oren2024tova",
}
UNPUBLISHED = {"blend", "full", "lru", "random", "switch", "union"}
OWN = {name: cls for name, cls in POLICIES.items() if cls.__module__.startswith("kvscope.policies.")}
PLAIN = Citation(key="doe2024", title="A Title", authors="Doe, Jane", year=2024, arxiv="2401.00001")


@dataclass
class Entry:
    """An entry as the parser below reads it."""

    kind: str
    fields: dict[str, str]


def parse(text: str) -> dict[str, Entry]:
    """Read BibTeX, and fail at anything that is not an entry with fields in balanced braces."""
    entries: dict[str, Entry] = {}
    at = 0

    def take(pattern: str) -> str:
        nonlocal at
        found = re.compile(pattern).match(text, at)
        assert found, f"expected {pattern} at {text[at : at + 40]!r}"
        at = found.end()
        return found[1] if found.lastindex else found[0]

    def braced() -> str:
        nonlocal at
        take(r"\{")
        start, depth = at, 1
        while depth:  # BibTeX counts every brace, also one after a backslash
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        return text[start : at - 1]

    take(r"\s*")
    while at < len(text):
        kind, key = take(r"@([a-z]+)\{"), take(r"([A-Za-z][A-Za-z0-9:.-]*),\s*")
        assert key not in entries, f"{key} is there twice"
        fields: dict[str, str] = {}
        while text[at] != "}":
            name = take(r"([a-z]+) = ")
            assert name not in fields, f"{key} has {name} twice"
            fields[name] = braced()
            take(r",\s*")
        take(r"\}\s*")
        entries[key] = Entry(kind, fields)
    return entries


def keys(sources: list[Source]) -> list[str]:
    return [one.citation.key for one in sources if one.citation is not None]


def test_every_policy_names_its_publication_or_has_none() -> None:
    assert {name: cls.citation.key for name, cls in OWN.items() if cls.citation is not None} == KEYS
    assert set(OWN) - set(KEYS) == UNPUBLISHED
    for name, cls in OWN.items():
        assert "citation" in vars(cls) or name in UNPUBLISHED, f"{name} has the publication of the class it is from"


@pytest.mark.parametrize("name", sorted(KEYS))
def test_the_publication_is_the_one_that_the_policy_names(name: str) -> None:
    cls = OWN[name]
    assert cls.citation is not None
    number = re.search(r"arXiv:(\d{4}\.\d{4,5})", cls.paper)
    if number:
        assert (cls.citation.arxiv or "").split("v")[0] == number[1]
    else:
        assert f"doi:{cls.citation.doi}" in cls.paper


def test_all_entries_are_strict_bibtex_in_ascii() -> None:
    text = bibtex(one.citation for one in cited_by_all() if one.citation is not None)
    assert text.isascii()
    entries = parse(text)
    assert set(entries) >= set(KEYS.values())
    assert list(entries) == sorted(entries)
    for key, entry in entries.items():
        fields = entry.fields
        assert {"title", "author", "year"} <= set(fields), key
        assert re.fullmatch(r"(19|20)\d\d", fields["year"]), key
        assert str(fields["year"]) in key, "the key has the year"
        assert {"inproceedings": "booktitle", "article": "journal", "misc": "eprint"}[entry.kind] in fields, key
        assert fields["title"][0] == "{" and fields["title"][-1] == "}", "its capital letters are kept"
        for name in fields["author"].split(" and "):
            assert "," in name or name.startswith("{"), f"{key}: {name} is neither a person nor an organisation"
        if "eprint" in fields:
            assert fields["archiveprefix"] == "arXiv"
            assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
    assert r"R{\'e}, Christopher" in entries["zhang2023h2o"].fields["author"]
    assert entries["deepseek2025v32"].fields["author"] == "{DeepSeek-AI}"


def test_special_characters_are_escaped() -> None:
    title = r"50% of $x_1 & {a} #1 \n ~ ^ Łódź č ü"
    made = replace(PLAIN, title=title, authors="Müller, Jörg and R&D {Lab", arxiv=None, journal="J_1", pages="1--2")
    fields = parse(bibtex([made]))["doe2024"].fields
    assert fields["author"] == r"M{\"u}ller, J{\"o}rg and {R\&D \textbraceleft{}Lab}"
    assert fields["journal"] == r"J\_1"
    back = fields["title"][1:-1]
    for written, meant in (
        *((rf"\text{name}{{}}", each) for name, each in (("braceleft", "{"), ("braceright", "}"))),
        *((rf"\text{name}{{}}", each) for name, each in (("asciitilde", "~"), ("asciicircum", "^"))),
        (r"{\'o}", "ó"),
        (r"{\'z}", "ź"),
        (r"{\v c}", "č"),
        (r"{\"u}", "ü"),
        *((f"\\{each}", each) for each in "%$_&#"),
        (r"\textbackslash{}", "\\"),
    ):
        assert written in back
        back = back.replace(written, meant)
    assert back == title, "nothing else was changed"


def test_an_entry_is_there_once_and_a_key_is_for_one_publication() -> None:
    assert len(parse(bibtex([PLAIN, PLAIN, replace(PLAIN)]))) == 1
    with pytest.raises(UsageError, match="doe2024"):
        bibtex([PLAIN, replace(PLAIN, year=2025)])
    assert bibtex([]) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", "doe 2024"),
        ("key", "doe,2024"),
        ("key", ""),
        ("arxiv", "arXiv:2401.00001"),
        ("arxiv", "2401.1"),
        ("doi", "https://doi.org/10.1000/1"),
        ("doi", "10.1000/a}b"),
        ("title", " "),
        ("authors", ""),
        ("authors", "Doe, Jane and "),
    ],
)
def test_a_publication_that_would_break_the_file_is_refused(field: str, value: str) -> None:
    with pytest.raises(UsageError):
        replace(PLAIN, **{field: value})  # type: ignore[arg-type]


def test_what_named_policies_use() -> None:
    def of(*specs: str) -> list[str]:
        return keys(cited_by(parse_policies(specs)))

    assert of("h2o", "a2sf:alpha=0.7") == ["zhang2023h2o", "jo2024a2sf"]
    assert of("h2o:variant=mask", "h2o:variant=flexgen", "h2o") == ["zhang2023h2o"]
    assert of("vatp") == ["guo2024vatp", "zhang2023h2o"], "the base too, which is h2o unless it is set"
    assert of("vatp:base=a2sf(alpha=0.7)") == ["guo2024vatp", "jo2024a2sf"]
    assert of("refreshkv") == ["xu2025refreshkv"]
    assert of("ada-kv") == ["feng2025adakv"]
    assert cited_by(parse_policies(["full"])) == [Source("full", None)]


def test_what_a_recorded_run_uses() -> None:
    assert keys(cited_in("h2o", "h2o", {"recent": None}, "uniform")) == ["zhang2023h2o"]
    assert keys(cited_in("snapkv", "snapkv ada", {}, "ada")) == ["li2024snapkv", "feng2025adakv"]
    assert keys(cited_in("snapkv", "snapkv pyramid", {}, "pyramid")) == ["li2024snapkv", "cai2024pyramidkv"]
    assert keys(cited_in("ada-kv", "ada-kv", {}, "ada")) == ["feng2025adakv"]
    tuned = {
        "tuned": "best.toml",
        "settings": [{"base": "tova"}, {"base": "h2o(recent=4)"}],
        "layers": [],
        "choice": [],
    }
    assert keys(cited_in("tuned", "vatp(@best.toml)", tuned, "uniform")) == [
        "guo2024vatp",
        "oren2024tova",
        "zhang2023h2o",
    ]
    assert cited_in("FadingMax", "FadingMax(fade=0.8)", {"fade": 0.8}, "uniform") == [Source("FadingMax", None, False)]
    assert cited_in("h2o", "h2o", {}, "mine")[1:] == [Source("allocation mine", None, False)]


def test_no_code_is_run_for_a_recorded_policy(tmp_path: Path) -> None:
    """A replay may be from somewhere else: the file that its base names is not read."""
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit('it was run')")
    base = f"{file}:Mine"
    assert cited_in("vatp", "vatp", {"base": base}, "uniform")[1:] == [Source(base, None, False)]


def test_a_policy_of_a_user_has_a_publication_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from kvscope.policies import Citation, Policy\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Policy):\n"
        '    """Retain."""\n\n'
        '    citation = Citation(key="me2026", title="Mine", authors="Me, I.", year=2026)\n'
    )
    assert keys(cited_by(parse_policies([f"{file}:Mine"]))) == ["me2026"]
