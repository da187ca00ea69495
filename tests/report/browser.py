"""A real browser for the tests of pages, and texts that must never become markup."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PWN = "window.pwned = true"
HOSTILE = [
    f"</script><script>{PWN}</script>",
    f"<img src=x onerror='{PWN}'>",
    f'"><svg onload="{PWN}">',
    f"javascript:{PWN}//",
    "\u2028\u2029'; alert(1)//",
    "\u202eevil\u202c\u200f",
    "\x00\x1b[31m\x7f",
    "{{constructor.constructor('alert(1)')()}}",
    "<a href='https://example.org'>link</a>",
    "%{text}<br><b>x</b>",
]


class Tab:
    """One open page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", *, before: str = "", **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        if before:  # a script that runs before those of the page
            self.page.add_init_script(before)
        self.page.set_default_timeout(20_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri() + fragment)
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def run(self, script: str, argument: Any = None) -> Any:
        """Return the value of a script, when everything that was asked for is drawn."""
        self.page.evaluate("kvscope.settled()")
        return self.page.evaluate(script, argument)

    def until(self, script: str) -> None:
        """Wait until a script returns true: Playwright's own waiting needs ``eval``, which the page forbids."""
        for _ in range(200):
            if self.page.evaluate(script):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {script}")

    def text(self, selector: str) -> str:
        """Return the text of the first element there, when everything that was asked for is drawn."""
        self.page.evaluate("kvscope.settled()")
        return str(self.page.locator(selector).first.inner_text())

    def count(self, selector: str) -> int:
        """Return how many elements there are, when everything that was asked for is drawn."""
        self.page.evaluate("kvscope.settled()")
        return int(self.page.locator(selector).count())

    def choose(self, label: str, option: str) -> None:
        """Choose an option of the bar."""
        self.page.locator(".choice").get_by_label(label, exact=True).select_option(label=option)

    def chosen(self, label: str) -> str:
        """Return what a control of the bar shows."""
        control = self.page.locator(".choice").get_by_label(label, exact=True)
        return str(control.evaluate("it => it.selectedOptions[0].text"))

    def address(self) -> dict[str, str]:
        """Return what the address says of the choice."""
        return dict(self.run("[...new URLSearchParams(location.hash.split('?')[1] || '')]"))
