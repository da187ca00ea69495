"""Colours, markers and dashes of lines, as in the page: they can be distinguished by colour-blind readers."""

from __future__ import annotations

# Okabe and Ito's colours, darkened where they are too pale for lines; the page has them in core.js.
PALETTE = ("#0072b2", "#c44e00", "#00805e", "#b5478d", "#9a6a00", "#2a93cf", "#6a4fb3", "#4d4d4d")
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
