"""Take the pictures of the example report that README.md shows: reports/example-*.png.

python tools/screenshots.py

Needs Chromium and Playwright, as tests/report/test_browser.py does.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

REPORTS = Path(__file__).resolve().parent.parent / "reports"
PAGE = REPORTS / "example.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Picture:
    """A picture of a panel or of the top of the page, with the selection in its address."""

    name: str
    panel: str | None
    choice: str
    scheme: str = "light"
    size: tuple[int, int] = (1280, 1400)  # higher than any panel: a picture ends where the window does


def pictures(data: dict[str, Any]) -> list[Picture]:
    """Return the three pictures of a page: the answer, two policies side by side, and a fact that one evicted."""
    run = {each["label"]: each["id"] for each in data["runs"] if (each["budget"], each["loop"]) == ("20%", "closed")}
    part = data["parts"]["0.0"]
    fact, asked = part["tokens"].index("5"), part["prompt"]  # the number to recall, and the step that has to
    choice = f"run={run['h2o']}&layer=2&head=2&token={fact}&step={asked}"
    return [
        Picture("overview", None, "", size=(1280, 800)),
        Picture("residency", "residency", f"{choice}&other={run['tova']}"),
        Picture("text", "text", choice, "dark"),
    ]


def main() -> int:
    """Return 0 if the pictures are taken, 2 if there is no browser."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print("no chromium: apt-get install chromium", file=sys.stderr)
        return 2
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for picture in pictures(data_of(browser)):
            print(take(browser, picture))
        browser.close()
    return 0


def data_of(browser: Browser) -> dict[str, Any]:
    """Return the data embedded in the page."""
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    page.close()
    return dict(data)


def take(browser: Browser, picture: Picture) -> Path:
    """Return the file of a picture, taken when everything is drawn."""
    width, height = picture.size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=picture.scheme)
    page.goto(f"{PAGE.as_uri()}#{picture.panel or 'overview'}?{picture.choice}")
    page.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate("kvscope.settled()")
    file = REPORTS / f"example-{picture.name}.png"
    if picture.panel is None:
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=file)
    else:
        page.add_style_tag(content="nav, .choice { position: static !important }")  # they would cover the panel
        page.locator(f"#{picture.panel}").screenshot(path=file)
    page.close()
    return file


if __name__ == "__main__":
    sys.exit(main())
