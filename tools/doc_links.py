"""The pages of the documentation, and their links: each must lead to a file, and to a heading in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "traces/README.md", "reports/README.md")


def documents() -> list[str]:
    """Return the path of every page of the documentation, relative to the repository."""
    return [*OUTSIDE, *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]


def links(text: str) -> Iterator[str]:
    """Yield the target of every link and picture of a page that is a file of the repository; code has none."""
    prose = re.sub(r"^(```+).*?^\1$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose):
        if "://" not in target and not target.startswith("mailto:"):
            yield target


def broken(page: Path, text: str) -> Iterator[str]:
    """Yield a line for every link of a page to a file that does not exist, or to a heading that its file has not."""
    for target in links(text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"links to {name}, which does not exist"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file if name else text):
            yield f"links to {target}, but there is no such heading"


@cache
def anchors(page: Path | str) -> set[str]:
    """Return the anchors of a page, given as a file or as its text: its headings, named as on the site."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    text = re.sub(r"^(```+).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set(re.findall(r'id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        slug = re.sub(r"[-\s]+", "-", words)
        number = 0
        while (name := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found
