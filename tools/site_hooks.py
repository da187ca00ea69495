"""What the site of the documentation needs beyond the files in ``docs/``; mkdocs loads this file as a hook.

Some pages are where a reader of the repository looks for them: CONTRIBUTING.md, CHANGELOG.md, traces/README.md and
reports/README.md. They become pages of the site, and other files of the repository that a page links to are copied to
it. Links are written for the repository and are rewritten here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "traces/README.md", "reports/README.md")
COPIES = "repository"  # folder of the site for other files


def on_config(config: Any) -> Any:
    """Add a page of every policy to the navigation, which lists their index alone."""
    for part in config.nav:
        if "Policies" in part:
            names = sorted(file.stem for file in (ROOT / "docs" / "policies").glob("*.md") if file.stem != "README")
            part["Policies"] = [*part["Policies"][:1], *({name: f"policies/{name}.md"} for name in names)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of ``docs/``."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return the text of a page with links that lead where the site has the file; what it lacks is copied to it."""
    source = page.file.src_uri
    here = posixpath.dirname(source if source in PAGES else f"docs/{source}")

    def rewritten(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if "://" in target or not target:
            return match[0]
        place = posixpath.normpath(posixpath.join(here, target))  # in the repository
        if place == "README.md":
            place = "docs/index.md"
        uri = place.removeprefix("docs/") if place.startswith("docs/") else place
        if not place.startswith("docs/") and place not in PAGES:
            uri = f"{COPIES}/{place}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
        return f"{match[1]}{posixpath.relpath(uri, posixpath.dirname(source) or '.')}{hash_}{anchor}{match[3]}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if index % 2 else re.sub(r"(\]\()([^)\s]+)([^)]*\))", rewritten, part) for index, part in enumerate(parts)
    )
