"""Put hostile strings wherever a text of a user or of a model goes, and look whether anything takes them for commands.

python tools/strings.py [--count N] [--seed S] [--output FILE]

Every string is the text of tokens and of the prompt, the name of a model, a policy, a replay, a trace and a span, the
title of a page and what the headers hold. Then

    terminal   every command that prints is run; its output has no control character, no character that reverses text
               and no command of a CI system, and no command ends in a traceback
    tables     no cell of the CSV files begins a formula, and every row has its columns
    JUnit      is XML with the elements and attributes of JUnit and nothing else
    Markdown   renders as headings, paragraphs and tables of text, without links, images and HTML
    page       opened in Chromium, with its content security policy and without, it runs nothing and fetches nothing

Anything else makes the exit status 1. Without Chromium the last rows are missing and it is said.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from markdown_it import MarkdownIt  # noqa: E402

from kvscope.cli import app, summary  # noqa: E402
from kvscope.report.page import report  # noqa: E402
from kvscope.results.store import Replay, open_replay  # noqa: E402
from kvscope.trace.reader import Trace, open_trace  # noqa: E402
from kvscope.trace.record import ModelRecord, PromptRecord  # noqa: E402
from tests.report.make import make_replay, make_trace  # noqa: E402

RUN = "window.hit=1"
AWAY = "https://example.invalid/"
KINDS: dict[str, tuple[str, ...]] = {
    "end of script": (f"</script><script>{RUN}</script>", f"</ScRiPt ><script>{RUN}//", f"</script\n><script>{RUN}"),
    "handlers": (
        f"<img src=x onerror='{RUN}'>",
        f'"><svg onload="{RUN}">',
        f"' autofocus onfocus='{RUN}' x='",
        f"<details open ontoggle={RUN}>",
        f"<body onload={RUN}>",
    ),
    "elements": (
        f"<iframe srcdoc='<script>parent.{RUN}</script>'>",
        f"<img src='{AWAY}x.png'>",
        f"<link rel=stylesheet href={AWAY}x.css>",
        f"<base href={AWAY}>",
        f"<meta http-equiv=refresh content='0;url={AWAY}'>",
        f"<object data={AWAY}>",
        f"<style>@import '{AWAY}x.css';</style>",
        f"<form action={AWAY}><input name=a></form>",
        "</title></head><body>",
        "</textarea></noscript></template>",
        f"<a href='javascript:{RUN}'>here</a>",
        f"<b>bold</b><a href='{AWAY}'>here</a>",
    ),
    "addresses": (f"javascript:{RUN}//", f"data:text/html,<script>{RUN}</script>", f"vbscript:{RUN}", f"//{AWAY[8:]}"),
    "templates": (
        f"{{{{constructor.constructor('{RUN}')()}}}}",
        f"${{{RUN}}}",
        f"`${{{RUN}}}`",
        "%{text}<br><extra></extra>",
        "{0}{title}{data}{policy}",
        "%(name)s %s %n",
        "__proto__",
        "constructor",
        "\\u003cscript\\u003e",
        "&lt;script&gt;&#60;b&#62;",
    ),
    "CDATA and comments": ("]]>", "<![CDATA[x]]>", "<!--", "-->", "<!--><script>", f"<!--<script>{RUN}", "--!>"),
    "separators": ("\u2028", "\u2029", f"\u2028{RUN}\u2029//", "'\u2028;alert(1)//", "\x85\x0b\x0c", "a\r\nb", "\r"),
    "surrogates": ("\ud800", "\udfff", "\udc80\ud83d", "\ude00\ud83d", "x\udfffy", "\udcff\udcfe"),
    "direction": ("\u202e", "\u200f\u200e", "\u2066\u2067\u2068\u2069", "\u061c", "\u202emoc.elpmaxe\u202c", "\u202b"),
    "controls": ("\x00", "\x01\x02\x03", "\x07\x08", "\x7f", "\x80\x84\x9f", "\x0e\x0f", "\x1a\x1c", "a\bb\b"),
    "ANSI": (
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\x1b[2J\x1b[H",
        "\x9b31m",
        "\x9d0;title\x9c",
        f"\x1b]8;;{AWAY}\x1b\\here\x1b]8;;\x1b\\",
        "\x1bP+q544e\x1b\\",
        "\x1b[6n",
        "\x1bc",
        "\x90x\x9c",
    ),
    "Rich": (
        "[red]x[/red]",
        "[/x]",
        "[link=https://a.b]x[/link]",
        "[bold",
        ":smile:",
        "[@click=app.bell]x[/]",
        "\\[x]",
    ),
    "formulas": (
        "=cmd|' /C calc'!A0",
        "+1+1",
        "-1+1|'a'!b",
        "@SUM(1,1)",
        "\t=1+1",
        "\r=1+1",
        "\n=1+1",
        "\uff1d1+1",
        "\uff0b1+1",
        "\uff0d1+1",
        "\uff20SUM(1)",
        '"=1+1',
        '",=1+1,"',
        "'=1+1",
        ";=1+1",
        f'=HYPERLINK("{AWAY}")',
        " =1+1",
        "%0A=1+1",
    ),
    "Markdown": (
        f"[x]({AWAY})",
        f"![x]({AWAY}x.png)",
        f"[x]: {AWAY}",
        f"<{AWAY}>",
        "| a | b |\n|---|---|\n| c |",
        "# heading",
        "```\ncode",
        "`code`",
        "**bold** _it_ ~~gone~~",
        "- a\n- b",
        "> quote",
        "---",
        "===",
        "1. one",
        "$$x$$",
        "[^1]",
        "a\\",
        "\\|",
        "&copy;",
    ),
    "XML": (
        "<!DOCTYPE x [<!ENTITY y 'z'>]>&y;",
        "<?xml version='1.0'?>",
        "&amp;&lt;&#0;&#x1;",
        "</testcase><failure/>",
        "\" name='x",
        "\ufffe\uffff",
        "<![CDATA[",
        "&undefined;",
    ),
    "CI commands": (
        "::error::x",
        "::add-mask::x",
        " \u00a0::warning file=a::x",
        "\u2003::notice::x",
        "a\n::error::x",
        "a\r::error::x",
        "x ##[add-mask]x",
        "##[error]x",
        "a\u2028::set-output name=a::b",
        "##vso[task.setvariable variable=a]b",
        "##teamcity[message text='x']",
        "section_start:1:x\r\x1b[0K",
        "\n\n\n",
        "x::stop-commands::y",
    ),
}
AROUND = ("{}", "a{}", "{} b", "{0}{0}", " {}", "x{}y", "xxxxxxxxxxxxxxxxxxx {}", "xxxxxxxxxxxxxxxxxxxx{}")
COMMANDS = ("::", "##[", "##vso[", "##teamcity[")
BIDI = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
MARKS = frozenset("\u200e\u200f\u061c")
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
NAME = 60  # characters of a file name
ON_A_PAGE = 8
OUTCOMES = ("shown", "refused", "wrong")


@dataclass(frozen=True)
class Said:
    """What a command printed, and its status."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Found:
    """What came of a string in one output: it was shown or refused, or it was wrong and why."""

    output: str
    kind: str
    outcome: str
    wrong: str


def hostile(count: int, seed: int) -> list[tuple[str, str]]:
    """Return that many strings, all different, each after its kind: every form first, then forms with text around."""
    draw = random.Random(seed)
    forms = [(kind, form) for kind, of in KINDS.items() for form in of]
    found = {form: kind for kind, form in draw.sample(forms, min(count, len(forms)))}
    while len(found) < count:
        for kind, of in KINDS.items():
            if len(found) < count:
                found.setdefault(draw.choice(AROUND).format(draw.choice(of)), kind)
    return [(kind, text) for text, kind in found.items()]


def as_name(text: str) -> str:
    """Return a string as a file name: everything that a file system takes is kept."""
    kept = "".join(one for one in text.replace("/", "\u2215").replace("\0", "") if fits(one))
    return "n" + kept[:NAME] if kept.strip(".") == kept else f"n{kept[:NAME]}n"


def fits(character: str) -> bool:
    """Return whether a file name may contain a character."""
    try:
        return bool(os.fsencode(character))
    except UnicodeEncodeError:
        return False


def make(text: str, other: str, folder: Path) -> tuple[Trace, Replay, Replay]:
    """Return a trace full of a string, a replay of it, and another one of it that lost attention mass."""
    name, wide = as_name(text), [text, other, f" {text}", "a", "\n", text]
    about = {
        "model": ModelRecord(id=text, revision=text, dtype=text),
        "prompts": [PromptRecord(file=text, sha256="c" * 64, text=text)],
        "versions": {"kvscope": text, text: text},
        "device": text,
        "command": text,
    }
    trace = make_trace(folder / "traces" / name, texts=wide, prompt=3, stored=("maps", "value_l1"), **about)
    policy = text.replace(":", "\ua789")  # its first part is the name
    replays = []
    for number, mass in enumerate((0.75, 0.5)):
        runs: dict[str, dict[str | None, float | None]] = {policy: {"2": mass}, "other": {"2": 0.6}}
        labels = {policy: text, "other": f"{text} {other}"}
        params = {policy: {text: text}}
        path = folder / "reports" / f"{name}{number}"
        replays.append(make_replay(path, trace, mass=runs, labels=labels, params=params, command=text))
    return trace, replays[0], replays[1]


def said_by(call: Callable[[], object]) -> Said:
    """Return what a function prints, as a terminal gets it."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", newline="") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = call()
        except Exception:
            status = 99
            traceback.print_exc()
    written = []
    for stream in streams:
        stream.flush()
        written.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Said(status if isinstance(status, int) else 0, *written)


def commands(
    text: str, other: str, trace: Trace, base: Replay, new: Replay, folder: Path
) -> dict[str, Callable[[], object]]:
    """Return every command that prints, by the name of its row."""
    own = folder / f"{as_name(text)}.py"
    own.write_text(OWN)
    one, first, second = str(trace.path), str(base.path), str(new.path)
    span = f"{text}=1:4"
    given = {
        "info": ["info", one],
        "info --json": ["info", one, "--json"],
        "info of a replay": ["info", first],
        "info of nothing": ["info", text],
        "replay": ["replay", one, "-p", f"{own}:Own", "-p", "h2o", "-b", "3", "-o", f"{as_name(text)}r"],
        "replay of nothing": ["replay", one, "-p", text, "-b", text],
        "diff": ["diff", first, second, "--all"],
        "diff --decisions": ["diff", first, second, "--decisions", "--json"],
        "compare": ["compare", first],
        "compare by name": ["compare", first, "-p", text, "-p", f"{text} {other}"],
        "compare of nothing": ["compare", first, "-p", text, "-p", "other", "--metric", text],
        "spans": ["spans", first, "-s", span, "-s", "b=text:a"],
        "spans --json": ["spans", first, "-s", span, "--json"],
        "spans of text": ["spans", first, "-s", f"a=text:{text}"],
        "regret": ["regret", first, "-p", "0"],
        "regret of all": ["regret", first],
        "regret --json": ["regret", first, "-p", "0", "--json"],
        "export": ["export", first, "--format", "csv", "-o", str(folder / "table"), "--force"],
        "report": ["report", first, "--data-only", "-o", str(folder / "page.json"), "--title", text, "--force"],
    }
    found: dict[str, Callable[[], object]] = {name: partial(app.run, arguments) for name, arguments in given.items()}
    return found | {"summary": lambda: summary.show(base), "summary --json": lambda: summary.show(base, as_json=True)}


OWN = '''
from dataclasses import dataclass
from kvscope import Policy

@dataclass(frozen=True)
class Own(Policy):
    """Retain what was retained. It has no other rule."""

    def observe(self, step, score):
        return score
'''


def wrong_on_a_terminal(said: Said) -> str:
    """Return what a terminal or a CI system would not merely show of an output, or an empty text."""
    for text in (said.out, said.err):
        bad = sorted({repr(one) for one in text if is_control(one)})
        if bad:
            return f"control characters {', '.join(bad)} in {text!r}"
        for line in text.splitlines():
            if runs(line):
                return f"a command of a CI system: {line!r}"
    if "Traceback" in said.err:
        return said.err
    if said.status not in (0, 1, 2, 3):
        return f"status {said.status}"
    lines = said.err.splitlines()
    if said.status in (1, 2) and not (len(lines) >= 2 and lines[-2].startswith("error: ") and lines[-1].strip()):
        return f"not two lines: {said.err!r}"
    return ""


def is_control(character: str) -> bool:
    """Return whether a terminal does more with a character than to show it."""
    kind = unicodedata.category(character)
    reverses = unicodedata.bidirectional(character) in BIDI or character in MARKS
    return (kind in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t") or reverses


def runs(line: str) -> bool:
    """Return whether a CI system would run a line of a log."""
    begun = line.lstrip()
    github = begun.startswith("::") and "::" in begun[2:]
    # GitHub's older form and Azure's are looked for everywhere in a line.
    return github or begun.startswith("##teamcity[") or any(mark in line for mark in ("##[", "##vso["))


def wrong_in_tables(folder: Path) -> str:
    """Return what is wrong with the CSV files of an export."""
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            head, *rows = csv.reader(opened)
        for row in [head, *rows]:
            if len(row) != len(head):
                return f"{file.name}: {len(row)} cells instead of {len(head)}: {row}"
            for cell in row:
                if cell.startswith(FORMULA) and not re.fullmatch(r"-?[0-9.]+(e-?[0-9]+)?", cell):
                    return f"{file.name}: a formula: {cell!r}"
    return ""


def wrong_in_junit(text: str) -> str:
    """Return what is wrong with a comparison as JUnit XML."""
    try:
        root = xml.fromstring(text.encode("utf-8"))
    except (xml.ParseError, UnicodeEncodeError) as error:
        return f"no XML: {error}: {text!r}"
    known = {"testsuites", "testsuite", "testcase", "failure"}
    attributes = {"name", "time", "tests", "failures", "errors", "classname", "message", "type"}
    odd = [each.tag for each in root.iter() if each.tag not in known or not each.attrib.keys() <= attributes]
    return f"elements {odd}" if odd else ""


MARKDOWN = frozenset(
    "heading paragraph table thead tbody tr th td strong".split()
)  # without inline texts, which are looked into


def wrong_in_markdown(text: str) -> str:
    """Return what is wrong with a comparison as Markdown: any element that the names have made."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        for each in (token, *(token.children or ())):
            kind = re.sub("_(open|close)$", "", each.type)
            if kind not in MARKDOWN | {"inline", "text", "text_special", "entity"}:
                return f"{each.type}: {each.content!r} in {text!r}"
    return ""


def wrong_outputs(folder: Path, base: Replay, new: Replay) -> Iterator[tuple[str, str]]:
    """Yield the name of each output that other programs read, and what is wrong with it."""
    yield "tables", wrong_in_tables(folder / "table")
    page = folder / "job.md"
    page.unlink(missing_ok=True)
    os.environ["GITHUB_STEP_SUMMARY"] = str(page)
    judges = {"junit": wrong_in_junit, "markdown": wrong_in_markdown}
    try:
        for form, judge in judges.items():
            said = said_by(partial(app.run, ["diff", str(base.path), str(new.path), "--format", form]))
            wrong = f"status {said.status}: {said.err}" if said.status != 3 else judge(said.out)
            yield form, wrong or wrong_on_a_terminal(said)
    finally:
        del os.environ["GITHUB_STEP_SUMMARY"]
    yield "job summary", wrong_in_markdown(page.read_text(encoding="utf-8"))


class Browser:
    """Chromium, which opens pages and counts what they do."""

    def __init__(self, chromium: str) -> None:
        from playwright.sync_api import sync_playwright

        self._started = sync_playwright().start()
        arguments = ["--no-sandbox", "--disable-gpu"]
        self._browser = self._started.chromium.launch(executable_path=chromium, args=arguments)

    def close(self) -> None:
        """End Chromium."""
        self._browser.close()
        self._started.stop()

    def wrong(self, page: Path, *, policy: bool) -> str:
        """Return what a page did that it should not, with its content security policy or without."""
        context = self._browser.new_context(bypass_csp=not policy)
        try:
            return self._wrong(context.new_page(), page, policy)
        finally:
            context.close()

    def _wrong(self, tab: Any, page: Path, policy: bool) -> str:
        said: list[str] = []
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: said.append(f"request: {request.url}"))
        tab.goto(page.as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        tab.evaluate(EVERYTHING)
        tab.wait_for_timeout(50)  # for what a handler of an image or a frame would do
        said.remove(f"request: {page.as_uri()}")
        said += [f"element: {each}" for each in tab.evaluate(MADE)]
        if tab.evaluate("window.hit") is not None:
            said.append("a string ran")
        tab.evaluate(f"(() => {{ const it = document.createElement('script'); it.textContent = '{RUN}';"
                     " document.body.append(it); })()")  # fmt: skip
        if (tab.evaluate("window.hit") is None) != policy:
            said.append("the page has its content security policy where it should not, or has none")
        return "; ".join(line for line in said if not line.startswith("error: Executing inline script violates"))


# Choose every run, open every table, and point at every drawing.
EVERYTHING = """async () => {
  const data = JSON.parse(document.getElementById('data').textContent);
  for (const details of document.querySelectorAll('details')) details.open = true;
  for (const run of data.runs) {
    kvscope.state.set({ run: run.id, token: 1, step: 4, layer: 1, head: 1 });
    await kvscope.settled();
    for (const it of document.querySelectorAll('canvas, .plot, [role=gridcell], [data-at]')) {
      const box = it.getBoundingClientRect();
      const where = { bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
      for (const kind of ['pointermove', 'mousemove', 'mouseover']) it.dispatchEvent(new MouseEvent(kind, where));
    }
  }
  await kvscope.settled();
}"""
MADE = """[...document.querySelectorAll('#page img, #page script, #page iframe, #page object, #page embed, #page link,'
  + '#page base, #page meta, #page form, #page style, a, [onerror], [onload], [onfocus], [ontoggle]')]
  .filter(it => !(it.localName === 'a' && (it.getAttribute('href') || it.getAttribute('xlink:href') || '#')
    .startsWith('#'))).map(it => it.outerHTML.slice(0, 200))"""


def try_strings(given: list[tuple[str, str]], work: Path) -> Iterator[Found]:
    """Yield what came of every string in every output; then the same of the pages."""
    for number, (kind, text) in enumerate(given):
        folder = work / str(number)
        folder.mkdir()
        os.environ["COLUMNS"] = ("40", "80", "200")[number % 3]
        with contextlib.chdir(folder):
            yield from one_string(kind, text, given[number - 1][1], folder)
    del os.environ["COLUMNS"]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        return
    browser = Browser(chromium)
    try:
        for first in range(0, len(given), ON_A_PAGE):
            yield from on_a_page(given, first, work, browser)
    finally:
        browser.close()


def one_string(kind: str, text: str, other: str, folder: Path) -> Iterator[Found]:
    """Yield what came of one string in every output but the pages."""
    trace, base, new = make(text, other, folder)
    for name, call in commands(text, other, trace, base, new, folder).items():
        said = said_by(call)
        yield Found(name, kind, "shown" if said.status in (0, 3) else "refused", wrong_on_a_terminal(said))
    for name, wrong in wrong_outputs(folder, base, new):
        yield Found(name, kind, "shown", wrong)


def on_a_page(given: list[tuple[str, str]], first: int, work: Path, browser: Browser) -> Iterator[Found]:
    """Yield what came of a page with some of the strings; each string counts."""
    shown = given[first : first + ON_A_PAGE]
    replays, traces = [], {}
    for number, (_, text) in enumerate(shown, first):
        replays.append(open_replay(work / str(number) / "reports" / f"{as_name(text)}0"))
        trace = open_trace(work / str(number) / "traces" / as_name(text))
        traces[trace.identity] = trace
    page = report(replays, traces, work / f"{first}.html", title=" ".join(text for _, text in shown))
    for policy in (True, False):
        wrong = browser.wrong(page, policy=policy)
        for kind, _ in shown:
            yield Found(f"page {'with' if policy else 'without'} its policy", kind, "shown", wrong)


def main() -> int:
    """Try the strings; returns 1 if one of them was more than text anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="try this string alone, in the syntax of Python")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    strings = hostile(given.count, given.seed)
    if given.only is not None:
        strings = [("given", json.loads(f'"{given.only}"'))]
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="kvscope-strings-") as work:
        for found in try_strings(strings, Path(work)):
            counts.setdefault(found.output, Counter())["wrong" if found.wrong else found.outcome] += 1
            if found.wrong:
                print(
                    f"{found.kind}: {found.output}: {found.wrong[-600:]}".encode("utf-8", "backslashreplace").decode()
                )
    for name, of in counts.items():
        print(f"{name:24} " + ", ".join(f"{outcome} {count}" for outcome, count in of.items()))
    if given.output:
        about = {"seed": given.seed, "strings": dict(Counter(kind for kind, _ in strings))}
        about |= {"outputs": {name: {key: of[key] for key in OUTCOMES} for name, of in counts.items()}}
        given.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if not any(name.startswith("page") for name in counts):
        print("without Chromium no page was opened")
    return int(any(of["wrong"] for of in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
