"""kvscope: record a model's attention, replay KV-cache eviction policies over it, see what each one loses.

``kvscope.trace(...)`` records, ``kvscope.open(...)`` opens a trace, ``kvscope.replay(...)`` replays policies,
``kvscope.perplexity(...)`` runs them inside the model, ``kvscope.report(...)`` writes the page, ``kvscope.diff(...)``
compares. Importing this package loads nothing heavy:
each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvscope.core.version import __version__ as __version__

if TYPE_CHECKING:
    import inspect

    from kvscope.analysis.compare import compare as compare
    from kvscope.analysis.find_regrets import regrets as regrets
    from kvscope.analysis.spans import Span as Span
    from kvscope.analysis.spans import spans_of as spans_of
    from kvscope.closed_loop.measure import perplexity as perplexity
    from kvscope.closed_loop.measure import verify as verify
    from kvscope.core.budget import Budget as Budget
    from kvscope.core.errors import KvscopeError as KvscopeError
    from kvscope.core.errors import ModelError as ModelError
    from kvscope.core.errors import ReplayError as ReplayError
    from kvscope.core.errors import ResultError as ResultError
    from kvscope.core.errors import TraceError as TraceError
    from kvscope.core.errors import UsageError as UsageError
    from kvscope.metrics.base import Metric as Metric
    from kvscope.metrics.base import Rows as Rows
    from kvscope.metrics.base import metric as metric
    from kvscope.model.generate import trace as trace
    from kvscope.model.own_loop import record as record
    from kvscope.policies.base import Policy as Policy
    from kvscope.policies.base import Protection as Protection
    from kvscope.policies.base import Step as Step
    from kvscope.policies.base import parameter as parameter
    from kvscope.policies.base import policy as policy
    from kvscope.policies.describe import describe as policies
    from kvscope.replay.rescore import rescore as rescore
    from kvscope.replay.run import replay as replay
    from kvscope.report.figures import plot as plot
    from kvscope.report.page import report as report
    from kvscope.report.panel import panel as panel
    from kvscope.results.diff import Diff as Diff
    from kvscope.results.diff import diff as diff
    from kvscope.results.export import export as export
    from kvscope.results.store import Replay as Replay
    from kvscope.results.store import open_replay as open_replay
    from kvscope.sharing.fetch import fetch as fetch
    from kvscope.trace.import_cache import import_cache as import_cache
    from kvscope.trace.importer import import_maps as import_maps
    from kvscope.trace.reader import Trace as Trace
    from kvscope.trace.reader import open_trace as open
    from kvscope.tracking.track import track as track

# Public name -> where it is defined.
_PUBLIC = {
    "Budget": "kvscope.core.budget:Budget",
    "Diff": "kvscope.results.diff:Diff",
    "KvscopeError": "kvscope.core.errors:KvscopeError",
    "Metric": "kvscope.metrics.base:Metric",
    "ModelError": "kvscope.core.errors:ModelError",
    "Policy": "kvscope.policies.base:Policy",
    "Protection": "kvscope.policies.base:Protection",
    "Replay": "kvscope.results.store:Replay",
    "ReplayError": "kvscope.core.errors:ReplayError",
    "ResultError": "kvscope.core.errors:ResultError",
    "Rows": "kvscope.metrics.base:Rows",
    "Span": "kvscope.analysis.spans:Span",
    "Step": "kvscope.policies.base:Step",
    "Trace": "kvscope.trace.reader:Trace",
    "TraceError": "kvscope.core.errors:TraceError",
    "UsageError": "kvscope.core.errors:UsageError",
    "compare": "kvscope.analysis.compare:compare",
    "diff": "kvscope.results.diff:diff",
    "export": "kvscope.results.export:export",
    "fetch": "kvscope.sharing.fetch:fetch",
    "import_cache": "kvscope.trace.import_cache:import_cache",
    "import_maps": "kvscope.trace.importer:import_maps",
    "metric": "kvscope.metrics.base:metric",
    "open": "kvscope.trace.reader:open_trace",
    "open_replay": "kvscope.results.store:open_replay",
    "panel": "kvscope.report.panel:panel",
    "parameter": "kvscope.policies.base:parameter",
    "perplexity": "kvscope.closed_loop.measure:perplexity",
    "plot": "kvscope.report.figures:plot",
    "policy": "kvscope.policies.base:policy",
    "record": "kvscope.model.own_loop:record",
    "regrets": "kvscope.analysis.find_regrets:regrets",
    "rescore": "kvscope.replay.rescore:rescore",
    "spans_of": "kvscope.analysis.spans:spans_of",
    "track": "kvscope.tracking.track:track",
    "verify": "kvscope.closed_loop.measure:verify",
}

# Public functions that have the name of a room: the room itself is called.
_ROOMS = {
    "policies": "kvscope.policies.describe:describe",
    "replay": "kvscope.replay.run:replay",
    "report": "kvscope.report.page:report",
    "trace": "kvscope.model.generate:trace",
}

__all__ = [
    "Budget",
    "Diff",
    "KvscopeError",
    "Metric",
    "ModelError",
    "Policy",
    "Protection",
    "Replay",
    "ReplayError",
    "ResultError",
    "Rows",
    "Span",
    "Step",
    "Trace",
    "TraceError",
    "UsageError",
    "__version__",
    "compare",
    "diff",
    "export",
    "fetch",
    "import_cache",
    "import_maps",
    "metric",
    "open",
    "open_replay",
    "panel",
    "parameter",
    "perplexity",
    "plot",
    "policies",
    "policy",
    "record",
    "regrets",
    "replay",
    "report",
    "rescore",
    "spans_of",
    "trace",
    "track",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _load(_PUBLIC[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class _Room(ModuleType):
    """A subpackage that is also the function it is named after: ``kvscope.trace(...)`` and ``kvscope.trace.reader``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]  # that of the function, which help shows
        return self._function().__doc__  # type: ignore[no-any-return]

    @property
    def __signature__(self) -> inspect.Signature:
        return importlib.import_module("inspect").signature(self._function())  # type: ignore[no-any-return]

    def _function(self) -> Any:
        return _load(_ROOMS[self.__name__.rpartition(".")[2]])


class _Package(ModuleType):
    """Makes a room callable when the import system hangs it into the package."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
