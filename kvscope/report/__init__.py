"""The report: plain data from opened replays and traces, drawn into one offline HTML page, or into single figures.

``kvscope.report(...)`` writes the page; ``kvscope.report.plot(replay, "budget_curve")`` returns a Plotly figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvscope.report.figures import plot as plot


def __getattr__(name: str) -> object:
    if name == "plot":  # loaded when it is first used, as all of the package is
        from kvscope.report.figures import plot

        return plot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
