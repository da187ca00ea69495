"""Definition of a panel: a function from replays and traces to plain data, and a script that draws the data.

The script calls ``kvscope.drawing(name, (box, data, page) => ...)``, which may be asynchronous; it puts elements into
``box``. ``page`` is what `kvscope.report.page.page_data` returns; its ``page.run()``, ``page.part()`` and
``page.token(position)`` return the selected run, part and token. ``kvscope.state.declare(name, usual, valid)``,
``get``, ``set`` and ``on`` manage the selection, which the address stores; ``kvscope.numbers(packed)`` unpacks numbers;
``kvscope.plot(box, traces, layout)`` draws with Plotly, ``kvscope.heat`` a table of colours; ``kvscope.latest(draw)``
runs asynchronous drawings one at a time, and ``kvscope.onTheme(draw)`` repeats them when the colours change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvscope.core.errors import UsageError
from kvscope.core.json import JsonDict
from kvscope.core.registry import Registry
from kvscope.report.source import OFFERS, ReportInput

Build = Callable[[ReportInput], JsonDict | None]
Builder = TypeVar("Builder", bound=Build)


@dataclass(frozen=True)
class Panel:
    """One part of the page.

    Attributes
    ----------
    name : str
        Identifies the panel in the page: its anchor and its drawing.
    title : str
        Heading.
    order : int
        Panels are shown from the smallest to the largest.
    needs : frozenset of str
        Data that the panel needs: ``summary``, ``fidelity``, ``residency``, ``trace``, ``outcome``, ``answers``.
    help : str
        How to read the panel, in two to four sentences.
    build : callable
        Function from `ReportInput` to JSON data. A list of strings under ``notes`` is shown under the heading.
        The panel is omitted if it returns None, because there is nothing to show.
    script : Path
        JavaScript that draws the data: the file beside the function's module with the suffix ``.js``.
    detail : bool
        Whether it shows the chosen run, layer, head, step and token: such panels are placed below the selection bar.
    """

    name: str
    title: str
    order: int
    needs: frozenset[str]
    help: str
    build: Build
    script: Path
    detail: bool = False


PANELS: Registry[Panel] = Registry("panel", "kvscope.panels", "kvscope.report.panels")


def panel(
    name: str, *, title: str, order: int, needs: Iterable[str] = ("summary",), help: str, detail: bool = False
) -> Callable[[Builder], Builder]:
    """Return a decorator that registers a function from `ReportInput` to plain data as a panel of the report.

    The parameters are attributes of `Panel`, which describes each. The script that draws the data is in a file beside
    the module, with the same name and the suffix ``.js``.

    Raises
    ------
    UsageError
        If it needs data that no report has, or if there is no script of the same name beside the module.
    """

    def register(function: Builder) -> Builder:
        needed = frozenset(needs)
        if not needed <= OFFERS:
            raise UsageError(
                f"panel {name!r} needs {', '.join(sorted(needed - OFFERS))}, which no report has",
                f"Choose from: {', '.join(sorted(OFFERS))}.",
            )
        script = Path(inspect.getfile(function)).with_suffix(".js")
        if not script.is_file():
            raise UsageError(
                f"panel {name!r} has no script: {script} does not exist",
                f"Write one that calls kvscope.drawing({name!r}, (box, data, page) => ...).",
            )
        made = Panel(name, title, order, needed, help, function, script, detail)
        PANELS.register(name, made, source=function)
        return function

    return register
