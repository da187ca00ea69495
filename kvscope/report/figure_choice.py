"""What a figure shows, and the empty figure that all begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.core.errors import ResultError
from kvscope.report.colours import BOUND, line_style
from kvscope.report.parts import Part
from kvscope.report.runs import MetricFacts, RunView
from kvscope.report.source import ReportInput

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Choice:
    """Metric, run and place of a figure; fields as the parameters of `kvscope.report.figures.plot`.

    `named` is whether the metric was named, and is not the default.
    """

    metric: MetricFacts
    named: bool
    run: RunView
    layer: int
    policies: tuple[str, ...] = ()
    against: str = "held"
    head: int | None = None
    step: int | None = None
    span: str | None = None

    def shows(self, label: str, usual: bool) -> bool | str:
        """Return Plotly's ``visible`` of the line of a policy."""
        return True if (label in self.policies if self.policies else usual) else "legendonly"

    def part(self, source: ReportInput) -> Part:
        """Return the first sequence of the run's replay."""
        return source.parts_of(self.run.replay)[0]

    def kv_head(self, head: int) -> int:
        """Return the key/value head of a query head."""
        own = self.run.replay.info.trace.heads_of(self.layer)
        return head // (own.heads // own.kv_heads)


Draw = Callable[[ReportInput, Choice], "Figure"]


def empty(title: str, x: str, y: str) -> Figure:
    """Return a figure without data."""
    from plotly.graph_objects import Figure  # slow to import: only when a figure is made

    figure = Figure()
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    return figure


def axis(metric: MetricFacts) -> str:
    """Return the title of a metric with its better end."""
    return metric.title if metric.direction == "none" else f"{metric.title} ({metric.direction} is better)"


def style_of(source: ReportInput, run: RunView) -> dict[str, object]:
    """Return Plotly's ``line`` and ``marker`` of a run: bounds are grey and dashed, policies as in the page."""
    if run.kind == "bound":
        return {"line": {"color": BOUND, "dash": "dot" if run.info.policy == "ideal" else "dash"}, "mode": "lines"}
    labels = source.labels
    ways = list(dict.fromkeys((each.source, each.protocol[1]) for each in sorted(source.runs, key=_closed_first)))
    style = line_style(labels.index(run.label), ways.index((run.source, run.protocol[1])))
    marker = {"color": style["color"], "symbol": style["symbol"]}
    return {"line": {"color": style["color"], "dash": style["dash"]}, "marker": marker, "mode": "lines+markers"}


def bars(low: list[float | None], mean: list[float | None], high: list[float | None]) -> dict[str, object] | None:
    """Return Plotly's error bars from `low` to `high`; None where no value has an interval."""
    pairs = [
        (0.0, 0.0) if None in (a, b, c) else (b - a, c - b)  # type: ignore[operator]
        for a, b, c in zip(low, mean, high, strict=True)
    ]
    if not any(down or up for down, up in pairs):
        return None
    down, up = zip(*pairs, strict=True)
    return {"type": "data", "symmetric": False, "arrayminus": list(down), "array": list(up)}


def needed(data: object, what: str, todo: str) -> Any:
    """Return the data of a panel; raises ResultError if the page would not show the panel."""
    if data is None:
        raise ResultError(f"the replay has no {what}", todo)
    return data


def _closed_first(run: RunView) -> str:
    return run.protocol[1]
