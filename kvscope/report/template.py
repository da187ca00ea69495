"""The HTML document of a page: style, scripts and data inline, without network access."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources

from kvscope.core.json import Json, JsonDict
from kvscope.report.encoding import deflated_text

# Characters that can end a script element early or change how it is parsed.
INERT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}

# Scripts that the drawings of each kind of page use, in order of dependence.
COMMON = ("core.js", "numbers.js", "state.js", "plot.js", "heat.js", "figure.js", "sections.js")
REPLAYS = (*COMMON, "raster.js", "raster_view.js", "page.js")
EXPERIMENT = (*COMMON, "experiment.js")

LONGEST_NAME = 100  # of a variable in Plotly's script
# The list of chart types in Plotly's script, behind the name of its core. The name is read backwards from here: a
# pattern that began with it would be tried at every letter of the script.
CHARTS = re.compile(r"\.register\(\[((?:\w+\(\),){20,}\w+\(\))\]\)")

DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="{generator}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript, which it contains; enable scripts to see it.</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{code}</script>
</body>
</html>
"""


def document(page: JsonDict, scripts: Sequence[str], files: Sequence[str] = REPLAYS) -> str:
    """Return the HTML document of a page.

    Plotly's script, by far the largest part, is deflated; the page inflates it when the first plot is drawn.

    Parameters
    ----------
    page : dict
        ``title``, ``generator`` and ``panels``, as plain data.
    scripts : sequence of str
        JavaScript of the drawings.
    files : sequence of str
        Scripts of the page itself: `REPLAYS` or `EXPERIMENT`.
    """
    # slow to import, and only a page needs it
    from plotly.offline import get_plotlyjs

    digest, plotly = _prepared(get_plotlyjs())
    code = element_text("\n".join(["'use strict';", *map(asset, files), *scripts, "kvscope.show();"]))
    return DOCUMENT.format(
        policy=security_policy([digest, _digest(code)]),
        generator=html.escape(str(page["generator"])),
        title=html.escape(str(page["title"])),
        style=asset("page.css"),
        data=inert_json(page),
        plotly=plotly,
        code=code,
    )


def charts_on_demand(plotly: str) -> str:
    """Return Plotly's script so that it prepares its chart types when ``Plotly.registerCharts()`` is called.

    The page draws lines and points, which its core draws. To prepare the about 50 other types takes most of the time in
    which the script starts; plot.js asks for them when the first other trace is drawn. A script without the one list of
    chart types is returned as it is, and prepares them when it starts.
    """
    for found in CHARTS.finditer(plotly):
        before, after = plotly[: found.start()], plotly[found.end() :]
        core = re.split(r"\W", before[-LONGEST_NAME:])[-1]
        if core:
            return f"{before}.registerCharts=()=>{core}.register([{found[1]}]){after}"
    return plotly


@lru_cache(maxsize=1)
def _prepared(plotly: str) -> tuple[str, str]:
    """Return the digest of Plotly's script as a page runs it, and the script deflated: once for all pages."""
    script = charts_on_demand(plotly)
    return _digest(script), deflated_text(script)


def inert_json(value: Json) -> str:
    """Return JSON in ASCII, with sorted keys, that every HTML parser reads as text."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escaped in INERT.items():
        text = text.replace(character, escaped)
    return text


def security_policy(digests: Sequence[str]) -> str:
    """Return a content security policy under which nothing is fetched and only scripts with these digests run."""
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


def element_text(script: str) -> str:
    """Return a script as it may be written in its element: with line feeds only, and nothing that ends the element.

    Raises
    ------
    ValueError
        If the script holds ``</script`` or ``<!--``.
    """
    text = script.replace("\r\n", "\n").replace("\r", "\n")
    lowered = text.lower()
    for mark in ("</script", "<!--"):
        if mark in lowered:
            raise ValueError(f"a script of the page holds {mark!r} at character {lowered.index(mark)}")
    return text


def asset(name: str) -> str:
    """Return the text of a file of the page's own style and script."""
    return resources.files("kvscope.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return the SHA-256 of a script in base64."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
