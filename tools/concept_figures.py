"""The figures of the pages on concepts and metrics: diagrams, and one small picture of each metric with its value.

The values are computed by the metrics of the package from one example, so pictures and code agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch

from kvscope.metrics.base import METRICS, Rows

FOLDER = "docs/figures"
STYLE = """<style>
text{font:13px sans-serif;fill:#1c2733}.small{font-size:11px;fill:#5a6675}.bold{font-weight:bold}
.box{fill:#e8eef5;stroke:#5b7a9d}.held{fill:#1f5f9e}.lost{fill:#f2d3b8;stroke:#b8702f}.line{stroke:#5b7a9d;fill:none}
.best{fill:none;stroke:#1c2733;stroke-width:2}
</style>"""
# The row of one query over twelve keys, the current one last, and the keys that the policy had retained.
ROW = (0.24, 0.02, 0.01, 0.02, 0.05, 0.03, 0.16, 0.02, 0.09, 0.06, 0.12, 0.18)
HELD, BUDGET = (0, 1, 8, 9, 10, 11), 5  # the current key is visible beside the budget
LATE = (4, 6, 8)  # keys that the head had not attended to for more than 64 steps
# Values of the twelve keys, of head size 2, so that outputs can be drawn in a plane.
VALUES = tuple(zip((9, 2, 5, 1, 8, 3, 1, 6, 7, 2, 8, 4), (2, 7, 1, 5, 3, 6, 9, 2, 1, 8, 4, 6), strict=True))
BAR, GAP, HEIGHT, LEFT = 30, 8, 120, 20
# metric -> what the picture marks, and the words beside the value
PICTURED = {
    "retained_mass": ("the dark bars, as a share of all", ()),
    "retained_mass_no_sinks": ("the same, without the first four keys", (4, 5, 6, 7, 8, 9, 10, 11)),
    "ideal_mass": ("the heaviest keys that fit into the budget (outlined), as a share of all", None),
    "ideal_recall": ("how many of the outlined keys are dark", None),
    "late_mass_retained": ("of keys not attended to for more than 64 steps (outlined), the dark part", LATE),
    "full_cosine": ("the angle between the row over the dark keys and the full row, as a cosine", ()),
    "ideal_cosine": ("the angle between the row over the dark keys and that over the outlined ones", None),
    "mask_cosine": ("the angle between the two sets: dark keys and outlined keys", None),
}


def pages() -> dict[str, str]:
    """Return the text of each figure by its path."""
    made = {f"{FOLDER}/{name.replace('_', '-')}.svg": metric(name) for name in PICTURED}
    drawn = {"flow": flow(), "prefill": prefill(), "loops": loops()}
    made[f"{FOLDER}/output-error.svg"] = output_error()
    return made | {f"{FOLDER}/{name}.svg": text for name, text in drawn.items()}


def values() -> dict[str, float]:
    """Return the value of every pictured metric on the example."""
    full = torch.tensor(ROW).reshape(1, 1, 1, -1)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[list(HELD)] = True
    mask = mask.reshape(1, 1, 1, 1, -1)
    last = torch.full((1, 1, 1, 12), 11)
    last[..., list(LATE)] = 11 - 65  # not attended to for 65 steps
    rows = Rows(
        full,
        mask,
        mask,
        torch.tensor([BUDGET]),
        torch.tensor([11]),
        signals={"last_attended": last, "values": _values()},
    )
    return {name: float(METRICS.get(name).compute(rows)) for name in (*PICTURED, "output_error")}


def _values() -> torch.Tensor:
    return torch.tensor(VALUES, dtype=torch.float32)[None, None]  # [L, G, n, D]


def output_error() -> str:
    """Return the picture of the output error: the outputs over all keys and over the dark ones."""
    row = torch.tensor(ROW)
    live = torch.where(torch.tensor([key in HELD for key in range(len(ROW))]), row, 0.0)
    over_all, over_held = (weights / weights.sum() @ _values()[0, 0] for weights in (row, live))
    scale, x0, y0 = 34, LEFT + 40, 200

    def at(point: torch.Tensor) -> tuple[float, float]:
        return x0 + scale * float(point[0]), y0 - scale * float(point[1])

    (x1, y1), (x2, y2) = at(over_all), at(over_held)
    value = f"{METRICS.get('output_error').name} = {values()['output_error']:.3f}"
    words = "the dashed line, as a share of the length of the full output"
    parts = [
        f'<path class="line" d="M{x0} 20V{y0}H{x0 + 320}"/>',
        f'<path class="best" d="M{x0} {y0}L{x1:.1f} {y1:.1f}"/>',
        f'<path class="line" stroke-width="3" d="M{x0} {y0}L{x2:.1f} {y2:.1f}"/>',
        f'<path class="best" stroke-dasharray="4 3" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>',
        f'<text x="{x1:.1f}" y="{y1 - 10:.1f}" text-anchor="end">output over all keys</text>',
        f'<text x="{x2 + 10:.1f}" y="{y2:.1f}">output over the keys in the cache</text>',
        f'<text class="small" x="{x0}" y="{y0 + 16}">the two numbers of each output, as a place</text>',
        f'<text class="bold" x="{LEFT}" y="{y0 + 40}">{escape(value)}</text>',
        f'<text x="{LEFT}" y="{y0 + 58}">{escape(words)}</text>',
    ]
    return _svg(LEFT * 2 + 12 * (BAR + GAP), y0 + 70, f"{value}: {words}", parts)


def metric(name: str) -> str:
    """Return the picture of a metric: the row as bars, dark where the key is in the cache, and its value."""
    words, marked = PICTURED[name]
    best = sorted(range(11), key=lambda key: (-ROW[key], -key))[:BUDGET]
    outlined: Sequence[int] = [*best, 11] if marked is None else marked
    parts = []
    for key, weight in enumerate(ROW):
        x, height = LEFT + key * (BAR + GAP), weight * 400
        kind = "held" if key in HELD else "lost"
        parts.append(f'<rect class="{kind}" x="{x}" y="{HEIGHT - height:g}" width="{BAR}" height="{height:g}"/>')
        if key in outlined:
            place = f'x="{x - 3}" y="{HEIGHT - height - 3:g}"'
            parts.append(f'<rect class="best" {place} width="{BAR + 6}" height="{height + 3:g}"/>')
        below = f'x="{x + BAR / 2:g}" y="{HEIGHT + 14}"'
        parts.append(f'<text class="small" {below} text-anchor="middle">{weight:.2f}</text>')
    value = f"{METRICS.get(name).name} = {values()[name]:.3f}"
    parts.append(f'<text class="bold" x="{LEFT}" y="{HEIGHT + 38}">{escape(value)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT + 56}">{escape(words)}</text>')
    return _svg(LEFT * 2 + 12 * (BAR + GAP), HEIGHT + 68, f"{value}: {words}", parts)


def flow() -> str:
    """Return the way from a model to a report."""
    boxes = [
        ("model + prompt", "", 10),
        ("trace", "attention rows, tokens, norms", 180),
        ("replay", "keys evicted, metrics", 400),
        ("report", "one HTML page", 600),
    ]
    parts = list(_boxes(boxes, 30))
    parts += [_arrow(140, 55, 178, 55), _arrow(350, 55, 398, 55), _arrow(570, 55, 598, 55)]
    for x, command in ((180, "kvscope trace"), (400, "kvscope replay"), (600, "kvscope report")):
        parts.append(f'<text class="small" x="{x}" y="20">{command}</text>')
    parts.append('<text class="small" x="400" y="104">many policies and budgets,</text>')
    parts.append('<text class="small" x="400" y="119">without the model</text>')
    parts.append('<text class="small" x="600" y="104">diff, compare, regret,</text>')
    parts.append('<text class="small" x="600" y="119">spans, export read it too</text>')
    return _svg(760, 130, "model and prompt, trace, replay, report", parts)


def prefill() -> str:
    """Return the number of keys held over the steps, under both prefills."""
    parts = []
    for x, name, points in (
        (20, "--prefill full", "0,100 160,20 160,68 300,68"),
        (390, "--prefill stream", "0,100 64,68 300,68"),
    ):
        path = " ".join(f"{x + int(a)},{int(b) + 30}" for a, b in (point.split(",") for point in points.split()))
        parts += [
            f'<text class="bold" x="{x}" y="18">{name}</text>',
            f'<polyline class="line" stroke-width="3" points="{path}"/>',
            f'<path class="line" d="M{x} 130H{x + 310}M{x} 130V30"/>',
            f'<path class="line" stroke-dasharray="4" d="M{x} 98H{x + 310}M{x + 160} 130V30"/>',
            f'<text class="small" x="{x + 315}" y="102">budget</text>',
            f'<text class="small" x="{x + 95}" y="146">end of the prompt</text>',
            f'<text class="small" x="{x + 270}" y="146">steps</text>',
            f'<text class="small" x="{x + 4}" y="40">keys held</text>',
        ]
    return _svg(760, 155, "Keys held over the steps, with full and with stream prefill", parts)


def loops() -> str:
    """Return where the rows of each loop come from."""
    parts = list(_boxes([("trace", "rows of the full cache", 20), ("policy", "evicts keys", 240)], 40))
    parts += [_arrow(190, 65, 238, 65), '<text class="bold" x="20" y="20">open loop</text>']
    parts.append('<text class="small" x="20" y="112">An eviction changes nothing in the model.</text>')
    parts += list(_boxes([("model", "runs again", 430), ("policy", "evicts keys", 620)], 40))
    parts += [
        _arrow(570, 55, 618, 55),
        _arrow(618, 78, 570, 78),
        '<text class="bold" x="430" y="20">closed loop</text>',
    ]
    parts.append('<text class="small" x="430" y="112">Later layers and tokens see the shortened cache.</text>')
    return _svg(780, 122, "Open loop: the rows come from the trace. Closed loop: the model runs again.", parts)


def _boxes(boxes: Sequence[tuple[str, str, int]], y: int) -> Iterator[str]:
    for name, about, x in boxes:
        width = 130 if not about or len(about) < 15 else 170
        yield f'<rect class="box" x="{x}" y="{y}" width="{width}" height="50" rx="6"/>'
        yield f'<text class="bold" x="{x + 10}" y="{y + (30 if not about else 21)}">{name}</text>'
        yield f'<text class="small" x="{x + 10}" y="{y + 39}">{about}</text>'


def _arrow(x: int, y: int, to: int, down: int) -> str:
    back = -6 if to > x else 6
    head = f"M{to + back} {down - 5}L{to} {down}L{to + back} {down + 5}"
    return f'<path class="line" stroke-width="2" d="M{x} {y}L{to} {down}{head}"/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    inner = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">\n'
        f"<title>{escape(title)}</title>\n{STYLE}\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n{inner}\n</svg>\n'
    )
