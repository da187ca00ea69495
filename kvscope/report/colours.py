"""Colours, markers and dashes of lines, as in the page: they can be distinguished by colour-blind readers."""

from __future__ import annotations

# Near the colours of Okabe and Ito, moved apart as colour-blind readers see them; the page has them in core.js.
PALETTE = ("#0e5998", "#b13d00", "#148360", "#b74e8c", "#bb8524", "#3298d4", "#6d56c6", "#404749")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
KEPT, EVICTED, BOUND = "#0b5c8e", "#f1dcc4", "#586374"


def line_style(place: int, way: int = 0) -> dict[str, str]:
    """Return colour, marker and dash of the line at a place: the dash changes with `way`, and when colours repeat."""
    turn = place // len(PALETTE)
    return {
        "color": PALETTE[place % len(PALETTE)],
        "symbol": MARKERS[(place + turn) % len(MARKERS)],
        "dash": DASHES[(2 * turn + way) % len(DASHES)],
    }
