"""Time until the page of many runs can be read: 27 policies under 3 budgets.

``python benchmarks/report_open.py [--tokens 720] [--times 5] [--output benchmarks/results/report_open.json]``

The bundled model reads a prompt and generates 64 tokens. The open loop replays 27 policies under 10 %, 20 % and 40 % of
the prompt, and the report of all 81 runs is opened in headless Chromium. Times are from navigation until
the first table is there, until the first screen is painted and answers to the reader, and until the last panel, far
below, is drawn; the median of several, each in a new tab.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

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
    parser.add_argument("--keep", type=Path, help="folder for trace, replay and page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {"machine": machine(), **measure(args.keep or Path(folder), args.tokens, args.times)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(folder: Path, tokens: int, times: int) -> dict[str, Any]:
    """Return the figures of one page."""
    prompt = folder / "prompt.txt"
    prompt.write_text(TEXT * (tokens // 39))
    trace = kvscope.trace("demo", [prompt], output=folder / "trace", max_new_tokens=64, store="maps+vectors")
    replay = kvscope.replay(trace, POLICIES, BUDGETS, output=folder / "replay")
    page = kvscope.report([replay], {trace.identity: trace}, folder / "page.html")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        seen = [opened(browser, page) for _ in range(times)]
        browser.close()
    return {
        "tokens": trace.sequences[0].length,
        "runs": len(replay.info.runs),
        "policies": len({run.label for run in replay.info.runs}),
        "page_mib": round(page.stat().st_size / 2**20, 2),
        "opened": {name: statistics.median(one[name] for one in seen) for name in seen[0]},
    }


def opened(browser: Browser, page: Path) -> dict[str, float]:
    """Return seconds from navigation to each mark; ``first_screen`` is when it is painted."""
    tab = browser.new_page(viewport={"width": 1440, "height": 900})
    marks = {"first_table": "#overview tbody tr", "first_screen": "html[data-shown]", "every_panel": "html[data-ready]"}
    tab.add_init_script(
        f"window.seen = {{}}; const marks = {json.dumps(marks)}; new MutationObserver(() => {{"
        " for (const [name, where] of Object.entries(marks)) if (!seen[name] && document.querySelector(where))"
        " seen[name] = performance.now(); }).observe(document, { subtree: true, childList: true, attributes: true });"
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached", timeout=120_000)
    seen = tab.evaluate("seen")
    tab.close()
    return {name: round(seen[name] / 1000, 2) for name in marks}


if __name__ == "__main__":
    main()
