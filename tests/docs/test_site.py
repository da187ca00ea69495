"""The site of the documentation: every page is in its navigation once, and links reach it. No generator is needed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml

from tests.docs.blocks import ROOT

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "traces/README.md", "reports/README.md")


def navigation(part: Any) -> Iterator[str]:
    """Yield the pages of a part of the navigation."""
    if isinstance(part, str):
        yield part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from navigation(each)


def settings() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(navigation(settings()["nav"]))
    files = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    policies = {name for name in files if name.startswith("policies/") and name != "policies/README.md"}
    assert len(policies) > 40, "tools/site_hooks.py adds them"
    assert sorted(listed) == sorted((files - policies) | set(OUTSIDE))


def test_every_page_is_reached_by_links_from_the_first() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        waiting += [(page.parent / target).resolve() for target in targets if "://" not in target]
    home = ROOT / "docs" / "index.md"  # the first page of the site, as README.md is of the repository
    assert {*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in OUTSIDE)} - reached <= {home}


def test_pages_link_to_no_folder() -> None:
    """The site copies files: a link to a folder ends its build."""
    for page in (ROOT / "docs").rglob("*.md"):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        assert [target for target in targets if "://" not in target and (page.parent / target).is_dir()] == [], page


def test_the_site_is_built_with_warnings_as_errors_and_loads_nothing_from_the_network() -> None:
    made = settings()
    assert made["strict"] is True and made["theme"]["font"] is False
    assert set(made["validation"].values()) == {"warn"}
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "make docs" in (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")


def test_the_tests_need_no_generator() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(each.startswith("mkdocs-material") for each in extras["docs"])
    assert not any("mkdocs" in each for name, needed in extras.items() if name != "docs" for each in needed)


def test_every_public_name_is_in_the_python_reference() -> None:
    import kvscope

    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    listed = set(names)
    assert len(names) == len(listed), "a name is there once"
    public = {getattr(kvscope, name) for name in kvscope.__all__ if not name.startswith("__")}
    places = {
        f"{getattr(each, '__module__', '')}.{getattr(each, '__qualname__', '')}"
        for each in public
        if isinstance(each, type | FunctionType)
    }
    missing = {place for place in places if place.startswith("kvscope.")} - listed
    assert not missing
