"""The summary table of a replay: its columns, and the notes under it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvscope.cli.answers import cell, show_tasks
from kvscope.cli.best import show_best
from kvscope.cli.console import ALWAYS, Column, show_json, show_table
from kvscope.cli.skipped import not_computed
from kvscope.cli.table_options import TableOptions
from kvscope.cli.table_rows import arranged

if TYPE_CHECKING:
    from kvscope.core.records import MetricRecord, ReplayRecord, SourceRef
    from kvscope.core.summary_records import RunSummary
    from kvscope.results.store import Replay

# Metric, header, and `Column.keep`: how late the column is dropped on a narrow terminal.
_METRICS = (
    ("retained_mass", "retained\nmass", ALWAYS),
    ("retained_mass_no_sinks", "without\nsinks", 90),
    ("late_mass_retained", "late\nmass", 96),
    ("output_error", "output\nerror", 97),
    ("ideal_mass", "ideal\nmass", 80),
    ("ideal_cosine", "ideal\ncosine", 95),
    ("full_cosine", "full\ncosine", 50),
    ("mask_cosine", "mask\ncosine", 40),
    ("ideal_recall", "ideal\nrecall", 85),
)
_LATENT = "latent_entries"
_SIZE = "cache_bytes"  # of a key/value head, where caches were quantised
# Of the closed loop: metric, header, digits, and `Column.keep`.
_OUTCOMES = (
    ("perplexity", "perplexity", 3, 99),
    ("perplexity_ratio", "ratio\nto full", 3, 98),
    ("token_kl", "KL\n(nats)", 3, 75),
    ("top1_agreement", "top-1\nequal", 3, 72),
)
# Names of all columns that a table may have, as --columns takes them.
COLUMNS = (
    *("policy", "budget", "keys", "evicts", "allocation", "decides", "decisions_changed", "read", "held"),
    *("latent_entries", "latent_bytes", "of_belady", "steps_below_half", "loop", "prefill", "count"),
    *(header.replace("\n", "_") for _, header, _ in _METRICS),
    *("perplexity", "ratio_to_full", "kl_nats", "top_1_equal"),
)


def show(replay: Replay, *, as_json: bool = False, table: TableOptions = TableOptions()) -> None:  # noqa: B008
    """Print the summary of a replay: the best policies, then a row for each policy and budget."""
    from kvscope.core.summary_records import SUMMARY

    summary = replay.summary
    if as_json:
        show_json(SUMMARY.plain(summary))
        return
    runs = arranged(summary.runs, summary.metrics, table.sort, table.top)
    shown = selected(columns(runs, summary.metrics), table.columns)
    show_best(summary)
    lines = notes(runs, replay.info)
    if len(runs) < len(summary.runs):
        lines.append(f"{len(runs)} of {len(summary.runs)} rows; --json prints all.")
    more = "--wide or --json prints everything"
    show_table(shown, title=str(replay.path), notes=lines, whole=table.wide, options=more)
    show_tasks(runs, replay.info)


def selected(table: Sequence[Column], names: str | None) -> list[Column]:
    """Return the columns that are named, in the order of the names, after policy and budget; all if none is named.

    A column that this table does not have is skipped: `require_columns` refuses names that none has.
    """
    if names is None:
        return list(table)
    by_name = {_name(column): column for column in table}
    return [by_name[name] for name in dict.fromkeys(["policy", "budget", *_names(names)]) if name in by_name]


def require_columns(names: str | None) -> None:
    """Raise UsageError for the name of a column that no summary table has."""
    from kvscope.core.errors import UsageError
    from kvscope.core.registry import nearest

    for name in _names(names or ""):
        if name not in COLUMNS:
            raise UsageError(f"the table has no column {name!r}", nearest(name, COLUMNS))


def _names(text: str) -> list[str]:
    return [name.strip().lower().replace("-", "_").replace(" ", "_") for name in text.split(",") if name.strip()]


def _name(column: Column) -> str:
    return _names(column.header.replace("\n", " ").replace("(", "").replace(")", ""))[0]


def columns(runs: Sequence[RunSummary], declared: Mapping[str, MetricRecord]) -> list[Column]:
    """Return the columns of the summary table.

    Parameters
    ----------
    runs : sequence of RunSummary
        The runs of ``summary.json``.
    declared : mapping of str to MetricRecord
        Properties of the metrics; a run that evicted nothing shows the declared value, dimmed.
    """
    mixed = len({_evicts(run) for run in runs} - {"never"}) > 1  # then policies are compared by what they hold and read
    without_evictions = {row for row, run in enumerate(runs) if _count(run) == 0}
    table = [
        Column("policy", [_label(run) for run in runs], wrap=18),
        Column("budget", [str(run.budget or "-") for run in runs], numeric=True),
        Column("keys", [_keys(run.budget_keys) for run in runs], keep=60, numeric=True),
        *_differing(runs),
        Column("read", [_mean(run, "read_keys") for run in runs], keep=ALWAYS if mixed else 70, numeric=True),
        Column("held", [_mean(run, "held_keys") for run in runs], keep=ALWAYS if mixed else 65, numeric=True),
    ]
    if any(_LATENT in run.metrics for run in runs):
        entries = [_mean(run, _LATENT) for run in runs]
        table.append(Column("latent\nentries", entries, keep=92, numeric=True, note=_latent(runs)))
        table.append(Column("latent\nbytes", [_bytes(run) for run in runs], keep=58, numeric=True))
    if any(_SIZE in run.metrics for run in runs):
        table.append(Column("cache\nbytes", [_bytes(run, _SIZE) for run in runs], keep=93, numeric=True))
    for name, header, keep in _METRICS:
        if not any(name in run.metrics for run in runs):
            continue
        cells = [
            _declared(declared.get(name)) if row in without_evictions else _number(run, name, 3)
            for row, run in enumerate(runs)
        ]
        measured = any(run.mean(name) is not None for run in runs)
        table.append(Column(header, cells, keep=keep if measured else 0, numeric=True, dim=without_evictions))
        if name == "retained_mass" and any(_of_belady(run) is not None for run in runs):
            shares = [_of_belady(run) for run in runs]
            cells = ["-" if share is None else f"{share:.3f}" for share in shares]
            table.append(Column("of\nbelady", cells, keep=88, numeric=True, note=_bounds(runs)))
    if any(run.tails for run in runs):
        table.append(Column("steps below\nhalf", [_below_half(run) for run in runs], keep=45, numeric=True))
    for name, header, digits, keep in _OUTCOMES:
        if any(name in run.metrics for run in runs):
            table.append(Column(header, [_number(run, name, digits) for run in runs], keep=keep, numeric=True))
    loops = {run.loop for run in runs}  # a policy then has a row for each
    table.append(Column("loop", [run.loop for run in runs], keep=ALWAYS if len(loops) > 1 else 10))
    table.append(Column("prefill", [run.prefill for run in runs], keep=11))
    table.append(Column("count", [f"{_count(run):,}" for run in runs], keep=30, numeric=True))
    return table


def _differing(runs: Sequence[RunSummary]) -> list[Column]:
    """Return columns of the properties in which the runs differ, other than policy and budget."""
    found = []
    evicts = [_evicts(run) for run in runs]
    if len(set(evicts) - {"never"}) > 1:
        found.append(Column("evicts", evicts, keep=94))
    allocations = [run.allocate for run in runs]
    if set(allocations) != {"uniform"}:
        found.append(Column("allocation", allocations, keep=42))
    if any(_LATENT in run.metrics for run in runs):
        found.append(Column("decides", [run.scope.replace("_", " ") for run in runs], keep=91))
    if any(run.decisions_changed is not None for run in runs):
        cells = ["-" if run.decisions_changed is None else f"{run.decisions_changed:,}" for run in runs]
        sums = {run.accumulate for run in runs if run.decisions_changed is not None}
        line = f"Decisions changed: evictions at a different step than with sums in float32, due to {', '.join(sums)}."
        found.append(Column("decisions\nchanged", cells, keep=93, numeric=True, note=line))
    return found


def _evicts(run: RunSummary) -> str:
    """Return when a run evicts: ``steps``, ``once``, ``every 16``, ``reads``, or ``never``."""
    if run.reads:
        return "reads"
    phase = run.phase
    if phase.startswith("every:"):
        return f"every {phase.removeprefix('every:')}"
    return {"step": "steps", "prefill": "once"}.get(phase, "never")


def notes(runs: Sequence[RunSummary], replay: ReplayRecord) -> list[str]:
    """Return the lines under the table."""
    kind = sorted({f"{run.loop} loop, {run.prefill} prefill" for run in runs})
    from kvscope.core.near_copies import copies_note

    trace = replay.trace
    lines = [f"{'; '.join(kind)}; trace {trace.name}, model {trace.model or 'unknown'}."]
    lines += trace.approximate
    errors = "; 0 for output error" if any("output_error" in run.metrics for run in runs) else ""
    lines.append(f"Means over the steps, heads and layers at which something had been evicted; 1 is best{errors}.")
    lines += not_computed(replay.left_out)
    if len({_evicts(run) for run in runs} - {"never"}) > 1:
        lines.append(
            "At one budget, policies that evict once or every few steps, and sparse readers, hold more keys than "
            "policies that evict at every step: compare read and held too."
        )
    full = [run.metrics["perplexity_full"].mean for run in runs if "perplexity_full" in run.metrics]
    if full:
        scored = max(run.count("perplexity") for run in runs)
        lines.append(f"Perplexity with the full cache: {full[0]:.4f}, over {scored:,} tokens{_protocol(trace)}.")
    gaps = [run.gap.held_overlap for run in runs if run.gap]
    if gaps:
        lines.append(
            f"Overlap of the keys held in open and closed loop: {min(gaps):.0%} (lowest policy) to {max(gaps):.0%} "
            "(highest). The lower it is, the less the open loop predicts the closed one."
        )
    if any(_count(run) == 0 for run in runs):
        lines.append("Dimmed: nothing was evicted; these are the declared values of a full cache, not measurements.")
    if any(value.low is not None for run in runs for name, value in run.metrics.items() if name == "retained_mass"):
        lines.append("Second line of a cell: 95 % interval over sequences.")
    if trace.near_copies:
        lines.append(f"{copies_note(trace.near_copies)}.")
    return lines


def _of_belady(run: RunSummary) -> float | None:
    """Return the retained mass divided by that of the best eviction schedule, where that is known."""
    return run.bounds.share_of_belady


def _latent(runs: Sequence[RunSummary]) -> str:
    """Return the note about latent entries, where each head decides."""
    if not any(run.scope == "kv_head" and _LATENT in run.metrics for run in runs):
        return ""
    return (
        "Latent entries: the vectors that a layer must hold for its heads, the union of their keys. If each kv head "
        "decides, a layer holds more entries than a head holds keys."
    )


def _bounds(runs: Sequence[RunSummary]) -> str:
    """Return the note about the bounds."""
    line = "Of belady: retained mass divided by that of the best eviction schedule"
    shares = {run.bounds.belady_of_ideal for run in runs}
    known = sorted(share for share in shares if share is not None)
    if known:
        span = f"{known[0]:.3f}" if len(known) == 1 else f"{known[0]:.3f} to {known[-1]:.3f}"
        line += f", which retains {span} times the mass of the ideal set"
    if any((_of_belady(run) or 0) > 1.0005 and not run.clairvoyant for run in runs):
        line += "; above 1: the policy holds more keys at some steps, or reads evicted keys again"
    return f"{line}."


def _protocol(trace: SourceRef) -> str:
    """Return which kind of text was scored, as a phrase."""
    words = {
        "generated": " that the model generated itself, on which every policy looks too good",
        "forced": " of a given continuation",
        "text": f" of plain text in windows of {trace.window}",
    }
    return words.get(trace.protocol, "")


def _label(run: RunSummary) -> str:
    return run.label.replace("(", "\n(", 1) if len(run.label) > 24 else run.label


def _count(run: RunSummary) -> int:
    return run.count("retained_mass")


def _keys(keys: int | Sequence[int]) -> str:
    if isinstance(keys, int):
        return str(keys)
    low, high = min(keys), max(keys)
    return str(low) if low == high else f"{low}-{high}"


def _number(run: RunSummary, name: str, digits: int) -> str:
    return cell(run.metrics.get(name), digits)


def _mean(run: RunSummary, name: str) -> str:
    """Return a mean number of keys; its interval tells the lengths of the sequences, and is not shown."""
    mean = run.mean(name)
    return "-" if mean is None else f"{mean:.1f}"


def _bytes(run: RunSummary, metric: str = "latent_bytes") -> str:
    """Return the size of the latent vectors that are held, or of a head's cache."""
    from kvscope.core.output import size

    held = run.mean(metric)
    return "-" if held is None else size(round(held))


def _below_half(run: RunSummary) -> str:
    """Return the share of steps at which a head retains less than half of its mass."""
    tails = run.tails.get("retained_mass")
    return "-" if tails is None else f"{tails.share_below_half:.1%}"


def _declared(metric: MetricRecord | None) -> str:
    value = None if metric is None else metric.when_nothing_evicted
    return "-" if value is None else f"{value:.3f}"
