"""Debian's Chromium, and how long the parts of a page take to appear in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from playwright.sync_api import Browser, Page, Playwright


def launch(started: Playwright) -> Browser:
    """Return a browser."""
    return started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])


def appeared(tab: Page, page: Path, marks: Mapping[str, str]) -> dict[str, float]:
    """Open a report, wait until all panels are drawn, and return the milliseconds until each CSS selector matched."""
    tab.add_init_script(
        f"window.seen = {{}}; const marks = {json.dumps(marks)}; new MutationObserver(() => {{"
        " for (const [name, where] of Object.entries(marks)) if (!seen[name] && document.querySelector(where))"
        " seen[name] = performance.now(); }).observe(document, { subtree: true, childList: true, attributes: true });"
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached", timeout=120_000)
    return {name: tab.evaluate("seen")[name] for name in marks}
