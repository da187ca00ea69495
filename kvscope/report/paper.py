"""Figures as vector files with a size in inches and a font size in points, drawn by Matplotlib.

Plotly needs a browser to write SVG or PDF. Matplotlib needs none, so this works offline, on clusters and in CI, and its
PDF contains the fonts as TrueType, as publishers require.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.core.registry import nearest
from kvscope.report.page import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.image import AxesImage
    from plotly.basedatatypes import BaseTraceType
    from plotly.graph_objects import Figure, Layout

FORMATS = ("pdf", "svg", "png")
DASHED: dict[str, object] = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
    "longdashdot": (0, (8, 3, 1, 3)),
}
MARKED = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "P",
    "x": "X",
    "star": "*",
}
ROOMY = 20  # columns of a map up to which numbers are written in its cells
DPI = 300  # of a PNG, and of maps inside of a vector file


@dataclass(frozen=True)
class Style:
    """Look of a figure.

    Attributes
    ----------
    width, height : float
        Size in inches.
    font_size : float
        Size of all text in points.
    title : bool
        Whether it has a heading; in a paper its caption says this.
    """

    width: float
    height: float
    font_size: float
    title: bool = False


# A column of a two-column paper, and a slide.
STYLES = {"paper": Style(3.3, 2.6, 8), "slides": Style(10, 5.6, 18, title=True)}


def style(name: str, width: float | None = None, height: float | None = None, font_size: float | None = None) -> Style:
    """Return a named style, with other sizes where they are given.

    Raises
    ------
    UsageError
        Unknown style, or a size that is not a number between 0.5 and 60 inches or 3 and 72 points.
    """
    if name not in STYLES:
        raise UsageError(f"no style is called {name!r}", nearest(name, STYLES))
    usual = STYLES[name]
    for what, value, low, high in (
        ("width", width, 0.5, 60),
        ("height", height, 0.5, 60),
        ("font size", font_size, 3, 72),
    ):
        if value is not None and not low <= value <= high:
            raise UsageError(f"a {what} of {value:g} cannot be drawn", f"Choose one from {low:g} to {high:g}.")
    return Style(width or usual.width, height or usual.height, font_size or usual.font_size, usual.title)


def save(figure: Figure, output: Path, look: Style, *, force: bool = False) -> Path:
    """Return the path of a PDF, SVG or PNG of a Plotly figure of `kvscope.report.figures.plot`.

    The same figure and style give the same bytes with the same version of Matplotlib.

    Raises
    ------
    UsageError
        If the suffix is none of these, or Matplotlib is not installed.
    ResultError
        If the file exists, or cannot be written.
    """
    form = output.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise UsageError(f"{output} has no format for figures", f"End its name with .{', .'.join(FORMATS)}.")
    return write_bytes(output, drawn(figure, form, look), force)


def drawn(figure: Figure, form: str, look: Style) -> bytes:
    """Return the bytes of a figure in a format."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise UsageError(
            "figures in files need Matplotlib, which is not installed", 'Install it: pip install "kvscope[plot]"'
        ) from error
    with matplotlib.rc_context(_settings(look)):
        canvas = Canvas(figsize=(look.width, look.height), layout="constrained")
        _fill(canvas, figure, look)
        made = io.BytesIO()
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[form]
        canvas.savefig(made, format=form, dpi=DPI, metadata=dated)
    return made.getvalue()


def _settings(look: Style) -> dict[Any, Any]:
    thin = look.font_size / 10
    return {
        "font.size": look.font_size,
        **{f"{name}.labelsize": look.font_size for name in ("axes", "xtick", "ytick")},
        "axes.titlesize": look.font_size,
        "legend.fontsize": look.font_size,
        "axes.linewidth": 0.8 * thin,
        "lines.linewidth": 1.4 * thin,
        "axes.grid": True,
        "grid.linewidth": 0.5 * thin,
        "grid.color": "#d9dee6",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a label is text, whatever signs it has
        "pdf.fonttype": 42,
        "svg.hashsalt": "kvscope",
    }


def _fill(canvas: Canvas, figure: Figure, look: Style) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    layout = figure.layout
    strip = "xaxis2" in layout
    ratios = [4, 1] if strip else [1]
    axes = canvas.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    axes[0].set(xlabel=_short(layout.xaxis.title.text), ylabel=_short(layout.yaxis.title.text))
    if strip:
        axes[1].set_xlabel("all held,\nby budget")
    if look.title:
        canvas.suptitle(layout.title.text or "")
    for data in figure.data:
        if data.type == "heatmap":
            _map(canvas, axes[0], data, layout)
        elif data.visible in (None, True):
            _line(axes[1] if strip and data.xaxis == "x2" else axes[0], data)
    for each in axes:
        each.margins(x=0.08 if each is axes[0] else 0.3)
    for name, own in (("x", layout.xaxis), ("y", layout.yaxis)):
        if own.type == "log":
            getattr(axes[0], f"set_{name}scale")("log")
            of_axis = getattr(axes[0], f"{name}axis")
            of_axis.set_major_formatter(LogFormatter())  # the usual one writes formulas
            of_axis.set_minor_formatter(LogFormatter())
    whole = all(isinstance(x, (int, np.integer)) for data in figure.data if data.type == "scatter" for x in data.x)
    if whole and isinstance(axes[0].xaxis.get_major_locator(), MaxNLocator):
        axes[0].xaxis.get_major_locator().set_params(integer=True)  # steps and layers
    if layout.xaxis.rangemode == "tozero":
        axes[0].set_xlim(left=0)
    if layout.xaxis.tickformat == ".0%":
        axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(canvas, list(axes), look)


def _short(title: str | None) -> str:
    """Return the title of an axis with an arrow for its better end."""
    return (title or "").replace(" (higher is better)", " ↑").replace(" (lower is better)", " ↓")


def _legend(canvas: Canvas, axes: list[Axes], look: Style) -> None:
    """Put the legend under the axes, in as many columns as fit."""
    pairs = [pair for each in axes for pair in zip(*each.get_legend_handles_labels(), strict=True)]
    if len(pairs) < 2:
        return
    labels = _apart([label for _, label in pairs])
    wide = (max(map(len, labels)) * 0.55 + 3) * look.font_size / 72  # inches of an entry: a character is about 0.55 em
    columns = max(1, min(len(labels), math.floor(look.width / wide)))
    tight = {"columnspacing": 1.0, "handlelength": 1.8, "handletextpad": 0.5, "labelspacing": 0.25, "borderpad": 0.2}
    canvas.legend(
        [handle for handle, _ in pairs], labels, loc="outside lower center", ncols=columns, frameon=False, **tight
    )


def _apart(labels: Sequence[str]) -> list[str]:
    """Return names without the parts, such as the loop, that most of them have in common."""
    parts = [label.split(" · ") for label in labels]
    common = {part for own in parts for part in own[1:] if 2 * sum(part in other[1:] for other in parts) > len(parts)}
    short = [" · ".join([own[0], *(part for part in own[1:] if part not in common)]) for own in parts]
    return short if len(set(short)) == len(short) else list(labels)


def _line(axes: Axes, data: BaseTraceType) -> None:
    pairs = [
        (x, y, at) for at, (x, y) in enumerate(zip(data.x, data.y, strict=True)) if x is not None and y is not None
    ]
    if not pairs:
        return
    x, y, places = (list(column) for column in zip(*pairs, strict=True))
    marks, lines = "markers" in data.mode, "lines" in data.mode
    error, ends, size = data.error_y, None, float(axes.xaxis.label.get_fontsize()) / 2
    if error.array is not None:
        ends = [[side[at] for at in places] for side in (error.arrayminus, error.array)]
    axes.errorbar(
        x,
        y,
        yerr=ends,
        label=data.name,
        color=data.line.color or data.marker.color,
        linestyle=DASHED[data.line.dash or "solid"] if lines else "none",
        marker=MARKED[data.marker.symbol or "circle"] if marks else "none",
        markersize=size * (0.6 if data.marker.size else 1.0),
        elinewidth=size / 6,
        capsize=size / 2,
    )


def _map(canvas: Canvas, axes: Axes, data: BaseTraceType, layout: Layout) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = np.asarray(data.z, np.float64)  # [rows, columns]
    named = {"cividis"} if isinstance(data.colorscale, str) else set()
    scale = data.colorscale or ()
    ends = [colour for _, colour in scale]
    colours = "cividis" if named or len(ends) != 2 else LinearSegmentedColormap.from_list("two", ends)
    numbers = data.x is not None and not isinstance(data.x[0], str)
    extent = None
    if numbers:  # an axis of numbers: the edges of its first and last cell
        (left, right), (top, bottom) = (_edges(side) for side in (data.x, data.y))
        extent = (left, right, bottom, top)
    image = axes.imshow(
        values,
        cmap=colours,
        vmin=data.zmin,
        vmax=data.zmax,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        rasterized=True,
    )
    axes.grid(visible=False)
    if not numbers:
        _names(axes, data, values.shape)
    if data.text is not None and values.shape[1] <= ROOMY:
        _numbers(axes, data, values, image)
    bar = canvas.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(data.colorbar.title.text or "")
    bar.outline.set_visible(False)


def _edges(places: Sequence[float]) -> tuple[float, float]:
    width = float(places[1] - places[0]) if len(places) > 1 else 1.0
    return float(places[0]), float(places[-1]) + width


def _names(axes: Axes, data: BaseTraceType, shape: tuple[int, ...]) -> None:
    rows = [str(name) for name in data.y] if data.y is not None else [str(place) for place in range(shape[0])]
    columns = [str(name) for name in data.x] if data.x is not None else [str(place) for place in range(shape[1])]
    every = max(1, math.ceil(len(columns) / 24)) if data.x is None else 1
    size = float(axes.xaxis.label.get_fontsize())
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are made on a figure"
    width, height = (inches * 72 * 0.6 for inches in figure.get_size_inches())  # points of the map
    axes.set_yticks(range(len(rows)), rows, fontsize=min(size, height / len(rows)))
    turn = {} if max(map(len, columns)) < 3 else {"rotation": 90, "fontsize": min(size, width / len(columns))}
    axes.set_xticks(range(0, len(columns), every), columns[::every], **turn)
    axes.tick_params(length=0)


def _numbers(axes: Axes, data: BaseTraceType, values: np.ndarray, image: AxesImage) -> None:
    """Write the number of each cell in it, in white or black, whichever can be read on its colour."""
    size = min(1.0, 11 / values.shape[1]) * axes.xaxis.label.get_fontsize()
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            ink = "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.49 else "#ffffff"
            axes.text(column, row, data.text[row][column], ha="center", va="center", color=ink, fontsize=size)
