"""Plain English: words that were replaced do not come back in documentation, help, messages, docstrings or the report.

Most of these words are metaphors that only the authors understood, or everyday words for which the field has a term.
docs/glossary.md explains the terms.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer

from kvscope.cli.app import program

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kvscope"
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "traces/README.md", "reports/README.md"),
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")),
)
COMMENTED = (
    "Makefile",
    "pyproject.toml",
    "mkdocs.yml",
    *(f".github/workflows/{name}.yml" for name in ("docs", "fidelity")),
)

# What must not be written -> what to write instead.
REPLACED = {
    r"\btwins?\b": "reference (test oracle), fallback (torch version of a kernel) or baseline (float32 shadow run)",
    r"\brid(?:e|es|ing|den)\b|\brode\b": "are computed in one pass, are stored beside, take part",
    r"\bhalf[- ](?:written|finished)\b": "incomplete",
    r"\b(?:un)?wanted\b": "selected, requested, attended to",
    r"\bgates? (?:for|in) (?:a|the) build\b|\bfidelity gate\b": "CI regression check; a gate is a learned module",
    r"\b(?:shared|handed) out\b": "allocated",
    r"\b(?:a|one|each|every|the) stays?\b|\bstays (?:of|that|whose)\b": "residency interval",
    r"\bc(?:ame|omes?) and (?:went|goe?s?)\b": "enters the cache and is evicted",
    r"\btold? apart\b|\btells? .{0,30}\bapart\b": "distinguished, different",
    r"\balike\b": "the same, equally",
    r"\bable\b": "can, supports",
    r"\bmend\b": "fix",
    r"\b(?:is|are|was|were) said\b": "is printed, is stated",
    r"\bwhat (?:is|was) there\b": "the existing file, the input",
    r"\bthe least perplexity\b": "the lowest perplexity",
    r"\b(?:does|do) not go with\b|\bgoes with\b": "is not compatible with, belongs to",
    r"\bgoes first\b|\bgo first\b": "is evicted first, is dropped first",
    r"\bcarr(?:y|ies|ied|ying)\b": "contain, store, support",
    r"\bstands?\b(?! for\b)": "is, is written",
    r"\bknows\b": "has, reads, uses",
    r"\bleft out\b|\bleaves? out\b": "skipped, omitted",
    r"\bgone\b|\bwent\b(?! through\b)": "evicted, missing",
    r"\blap by lap\b|\beach lap\b": "round by round",
    r"\bnobody\b|\bwho asks\b": "name the reader, or use the passive",
    r"\bhow far the open loop is from the closed\b": "compare the open loop with the closed loop",
    r"\bkeep their place in the text\b|\bget that in the cache\b": "RoPE positions: original, or renumbered",
    r"(?<!there )\bis no (?!longer\b|more\b|less\b|better\b|worse\b)": "is not a",
}
FOUND = re.compile("|".join(f"(?P<p{place}>{pattern})" for place, pattern in enumerate(REPLACED)), re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """A replaced word: where it is, what it is, and what to write instead."""

    where: str
    words: str
    instead: str

    def __str__(self) -> str:
        return f"{self.where}: {self.words!r}; write: {self.instead}"


def check(where: str, text: str) -> list[Finding]:
    """Return the replaced words in a text; code in backticks is no text."""
    prose = " ".join(re.sub(r"`[^`]*`", "`code`", text).split())
    return [
        Finding(where, match[0], list(REPLACED.values())[int(str(match.lastgroup)[1:])])
        for match in FOUND.finditer(prose)
    ]


def documents() -> Iterator[tuple[str, str]]:
    """Yield the documents without their code blocks, and the comments of the build files."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        yield name, re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in COMMENTED:
        yield name, "\n".join(re.findall(r"#(.*)", (ROOT / name).read_text(encoding="utf-8")))


def helps() -> Iterator[tuple[str, str]]:
    """Yield the help of every command, of every group, and of their options and arguments."""
    waiting = [("kvscope", typer.main.get_command(program()))]
    while waiting:
        name, command = waiting.pop()
        yield name, f"{command.help or ''} {command.epilog or ''}"
        for parameter in command.params:
            yield f"{name} {parameter.name}", str(getattr(parameter, "help", None) or "")
        waiting += [(f"{name} {each}", part) for each, part in getattr(command, "commands", {}).items()]


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string of a Python file that is a sentence or a part of one.

    Docstrings are excepted, and titles and names of publications, which are quoted.

    Errors, notes, warnings, help of parameters, notes of panels and descriptions of fields are all such strings.
    """
    nodes = list(ast.walk(ast.parse(source)))
    no_message = {
        id(node.value) for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    quoted = [node for node in nodes if isinstance(node, ast.Call) and is_named(node.func, "Citation")]
    no_message |= {id(part) for call in quoted for part in ast.walk(call)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            no_message |= {id(part) for part in node.values}
            text = "".join(part.value if isinstance(part, ast.Constant) else "`code`" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in no_message:
            text = node.value
        else:
            continue
        if re.search(r"\s", text.strip()):
            yield node.lineno, text


def is_named(node: ast.expr, name: str) -> bool:
    """Return whether an expression is this name."""
    return isinstance(node, ast.Name) and node.id == name


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings of a module and of all that is public in it."""
    public: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [ast.parse(source)]
    while public:
        node = public.pop()
        text = ast.get_docstring(node)
        if text:
            # examples and lists of terms are not prose
            yield getattr(node, "lineno", 1), re.sub(r"^ *>>>.*$|``.*?``", "", text, flags=re.MULTILINE)
        if not isinstance(node, ast.FunctionDef):
            parts = [part for part in node.body if isinstance(part, (ast.ClassDef, ast.FunctionDef))]
            public += [part for part in parts if not part.name.startswith("_")]


def pages(source: str, suffix: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of what a script or a template of the report shows."""
    if suffix == ".html":
        yield 1, re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>|\{\{.*?\}\}", " ", source, flags=re.DOTALL)
        return
    for match in re.finditer(r"\"([^\"\n]* [^\"\n]*)\"|'([^'\n]* [^'\n]*)'|`([^`]* [^`]*)`", source):
        text = next(filter(None, match.groups()))
        yield source.count("\n", 0, match.start()) + 1, re.sub(r"\$\{[^}]*\}", "code", text)


@cache
def package() -> dict[str, list[Finding]]:
    """Return the replaced words of the package, by room."""
    found: dict[str, list[Finding]] = {}
    for file in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".html")):
        source, name = file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
        parts = [messages(source), docstrings(source)] if file.suffix == ".py" else [pages(source, file.suffix)]
        for line, text in (each for part in parts for each in part):
            found.setdefault(file.relative_to(PACKAGE).parts[0], []).extend(check(f"{name}:{line}", text))
    return found


@pytest.mark.parametrize("name", [*DOCUMENTS, *COMMENTED])
def test_documents(name: str) -> None:
    found = [finding for where, text in documents() if where == name for finding in check(where, text)]
    assert [str(finding) for finding in found] == []


def test_help() -> None:
    assert [str(finding) for where, text in helps() for finding in check(where, text)] == []


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")))
def test_messages_docstrings_and_report(room: str) -> None:
    found = package().get(room, [])
    assert [str(finding) for finding in found] == []


EXAMPLES = [
    "each kernel has a twin in torch",
    "several runs ride in one pass",
    "what was half written can be deleted",
    "keys that were long unwanted",
    "A gate for a build",
    "how its budget is shared out",
    "one row is one stay of one key",
    "every key came and went",
    "the sequences do not tell the two apart",
    "decided alike",
    "what a device is able to hold",
    "Mend or remove the package",
    "its size is said",
    "replaces what is there",
    "loses the least perplexity",
    "--dtype does not go with --model",
    "the oldest key goes first",
    "the address carries the choice",
    "the label stands below",
    "a bound knows rows to come",
    "output_error is left out",
    "the key was gone",
    "ratios are formed lap by lap",
    "nobody looked at it",
    "how far the open loop is from the closed one",
    "keys keep their place in the text",
    "this is no trace",
]


def test_every_replaced_word_is_found() -> None:
    assert len(EXAMPLES) == len(REPLACED)
    for example, instead in zip(EXAMPLES, REPLACED.values(), strict=True):
        assert instead in [finding.instead for finding in check("example", example)], example


@pytest.mark.parametrize(
    "text",
    [
        "A probable, capable overridden bridge.",
        "The prompt went through the model; there is no trace; it is no longer read; it is no better.",
        "A policy stays within its budget, and H stands for the number of heads.",
        "`wanted` and `gone` are columns.",
    ],
)
def test_other_words_are_not_found(text: str) -> None:
    assert check("text", text) == []


def test_a_finding_says_what_to_write() -> None:
    (found,) = check("somewhere", "Two policies decide alike.")
    assert str(found) == "somewhere: 'alike'; write: the same, equally"


def test_messages_are_collected_from_every_call() -> None:
    source = '''
"""No message: the docstring."""
raise UsageError(f"{name} is wrong: half written", "Mend it.")
note("rides along", quiet=quiet)
why = "looks alike"
key = "wanted"
'''
    texts = sorted(messages(source), key=lambda each: each[0])
    assert [line for line, _ in texts] == [3, 3, 4, 5], "a key without a space is no message"
    words = {finding.words for _, text in texts for finding in check("", text)}
    assert words == {"half written", "Mend", "rides", "alike"}


def test_docstrings_are_collected_from_what_is_public() -> None:
    source = '''
"""A twin."""
class Public:
    """Alike."""
    def method(self):
        """Gone."""
        def inner():
            """Unwanted."""
    def _private(self):
        """Unwanted."""
def function():
    """Return ``wanted``.

    >>> unwanted
    """
'''
    words = [finding.words for _, text in docstrings(source) for finding in check("", text)]
    assert sorted(words) == ["Alike", "Gone", "twin"]


def test_texts_of_the_report_are_collected() -> None:
    script = "box.title = 'why a key went';\nconst text = `${wanted} keys ride`; get(\"wanted\");"
    found = [(line, finding.words) for line, text in pages(script, ".js") for finding in check("", text)]
    assert found == [(1, "went"), (2, "ride")]
    page = "<p class='wanted'>Two twins</p><script>var twin</script>"
    assert [finding.words for _, text in pages(page, ".html") for finding in check("", text)] == ["twins"]
