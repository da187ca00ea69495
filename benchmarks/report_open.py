"""Time until the page of many runs can be read: 27 policies under 3 budgets.

``python benchmarks/report_open.py [--tokens 720] [--times 5] [--output benchmarks/results/report_open.json]``

The bundled model reads a prompt and generates 64 tokens. The open loop replays 27 policies under 10 %, 20 % and 40 % of
the prompt, and the report of all 81 runs is opened in headless Chromium. Times are from navigation until
the first table is there, until the first screen is painted and answers to the reader, and until the last panel, far
below, is drawn. ``jump`` is from a click on the last plot, as soon as the first screen is painted, until that plot is
drawn. ``processor`` is what the tab takes in all; on a busy machine it says more than the times. Each figure is the
median of several, each in a new tab. ``--page`` measures a page that is there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from chromium import appeared, launch
from machine import machine
from playwright.sync_api import Browser, sync_playwright

import kvscope

BUDGETS = "10%,20%,40%"
POLICIES = (
    *(
        "a2sf",
        "ada-kv",
        "cake",
        "chunkkv",
        "h2o",
        "headkv",
        "key-norm",
        "keydiff",
        "keyformer",
        "lacache",
        "lagkv",
        "lru",
    ),
    *("morphkv", "pyramidkv", "quest", "r-kv", "raas", "random", "recycled-attention", "refreshkv", "roco"),
    *("scissorhands", "snapkv", "streaming-llm", "tova", "vatp", "window"),
)
TEXT = "The captain looked at the sea. Clara holds 583. It was late, and the lamp above the door was the only light. "


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=720)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/report_open.json"))
    parser.add_argument("--page", type=Path, help="page to measure instead of a new one")
    parser.add_argument("--keep", type=Path, help="folder for trace, replay and page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = {} if args.page else make(args.keep or Path(folder), args.tokens)
        page = args.page or (args.keep or Path(folder)) / "page.html"
        figures = {"machine": machine(), **made, **measure(page, args.times)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def make(folder: Path, tokens: int) -> dict[str, Any]:
    """Return what is in ``page.html``, which is written into the folder."""
    prompt = folder / "prompt.txt"
    prompt.write_text(TEXT * (tokens // 39))
    trace = kvscope.trace("demo", [prompt], output=folder / "trace", max_new_tokens=64, store="maps+vectors")
    replay = kvscope.replay(trace, POLICIES, BUDGETS, output=folder / "replay")
    kvscope.report([replay], {trace.identity: trace}, folder / "page.html")
    return {
        "tokens": trace.sequences[0].length,
        "runs": len(replay.info.runs),
        "policies": len({run.label for run in replay.info.runs}),
    }


def measure(page: Path, times: int) -> dict[str, Any]:
    """Return the size of a page, and the median of what `opened` measures."""
    with sync_playwright() as started:
        browser = launch(started)
        seen = [opened(browser, page) for _ in range(times)]
        browser.close()
    return {
        "page_mib": round(page.stat().st_size / 2**20, 2),
        "opened": {name: statistics.median(one[name] for one in seen) for name in seen[0]},
    }


def opened(browser: Browser, page: Path) -> dict[str, float]:
    """Return seconds from navigation to each mark, of the processor, and of a jump.

    ``first_screen`` is when it is painted, ``every_panel`` when all are drawn.
    """
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    costs = tab.context.new_cdp_session(tab)
    costs.send("Performance.enable")
    marks = {"first_table": "#overview tbody tr", "first_screen": "html[data-shown]", "every_panel": "html[data-ready]"}
    seen = appeared(tab, page, marks)
    spent = {each["name"]: each["value"] for each in costs.send("Performance.getMetrics")["metrics"]}
    tab.close()
    found = {name: round(seen[name] / 1000, 2) for name in marks}
    return {**found, "processor": round(spent["ProcessTime"], 2), "jump": jump(browser, page)}


def jump(browser: Browser, page: Path) -> float:
    """Return seconds from a click on the last plot, when the first screen is painted, until that plot is drawn."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    tab.add_init_script(
        "const watch = (where, found) => new MutationObserver((_, self) => {"
        " if (found()) { self.disconnect(); window.seen.push(performance.now()); } })"
        ".observe(where, { subtree: true, childList: true, attributes: true }); window.seen = [];"
        "watch(document, () => { if (!document.documentElement.dataset.shown) return false;"
        " const panel = document.querySelector('#queries'); document.querySelector('nav a[href=\"#queries\"]').click();"
        " watch(panel, () => panel.querySelector('.plot .infolayer')); return true; });"
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached", timeout=120_000)
    took = tab.evaluate("seen[1] - seen[0]")
    tab.close()
    return round(took / 1000, 2)


if __name__ == "__main__":
    main()
