"""The first sentence of the page: the best policies by each metric, what they hold, and whether the metrics agree."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.json import Json, JsonDict
from kvscope.core.options import Prefill
from kvscope.report.encoding import rounded
from kvscope.report.runs import MetricFacts, RunView
from kvscope.report.source import ReportInput
from kvscope.results.ranking import HEADLINES, KINDS, agree, best_among

# Metric -> its words in the sentence, and how its mean is written.
WORDS = {
    "answer_score": ("share of right answers", "{:.0%}"),
    "perplexity_ratio": ("perplexity", "{:.3f}x full cache"),
    "output_error": ("output error", "{:.3f}"),
    "late_mass_retained": ("late mass", "{:.3f}"),
    "retained_mass": ("retained mass", "{:.3f}"),
}
ENDS = {"higher": "highest", "lower": "lowest"}
APART = (
    "No policy is the best by all of these metrics. Right answers and perplexity are what the model does; output "
    "error, late mass and retained mass estimate it without running the model again."
)
NAMED = 2  # policies with the same best mean that are named


def headline(source: ReportInput) -> list[Json]:
    """Return one sentence for each trace, as pieces of text.

    A piece is ``text``, with ``how`` where it is explained, and ``run`` where it names a run. The runs are those of the
    kind and budget that the page shows first.
    """
    first = source.first
    sentences: list[Json] = []
    for group in shown_groups(source):
        one = group[0]
        if (one.protocol[2], one.budget, one.kind, one.phase, one.info.cache) == (
            first.protocol[2],
            first.budget,
            first.kind,
            first.phase,
            first.info.cache,
        ):
            pieces = _sentence(source, group)
            sentences += [pieces] if pieces else []
    return sentences


def _sentence(source: ReportInput, group: Sequence[RunView]) -> list[Json]:
    """Return the pieces of the sentence about one group of comparable runs; none if no metric has a best end."""
    by = {name: winners(group, MetricFacts.of(name, source.metrics.get(name, {}))) for name in HEADLINES}
    by = {name: found for name, found in by.items() if found[1]}
    if not by:
        return []
    first = group[0]
    apart = len({run.protocol[0] for run in source.runs}) > 1
    pieces: list[Json] = [_piece(f"{first.source}: at" if apart else "At"), _piece(f" budget {first.budget}")]
    pieces += _held(group)
    pieces.append(_piece(f": of {len(group)} policies (kind: {first.kind}), " if len(group) > 1 else ": "))
    named: dict[tuple[str, ...], list[str]] = {}
    for name, (_, best) in by.items():
        named.setdefault(tuple(run.id for run in best), []).append(name)
    runs = {run.id: run for run in group}
    for place, (ids, metrics) in enumerate(named.items()):
        pieces += [_piece("; ")] if place else []
        pieces += _names([runs[id] for id in ids])
        pieces.append(_piece(" has " if len(ids) == 1 else " have "))
        for at, name in enumerate(metrics):
            pieces += [_piece(" and " if at == len(metrics) - 1 else ", ")] if at else []
            pieces.append(_value(source, group, name, by[name]))
    pieces.append(_piece("."))
    if not agree([run.label for run in best] for _, best in by.values()):
        pieces += [_piece(" "), _piece("They disagree.", APART)]
    return pieces


def _piece(text: str, how: str | None = None, run: str | None = None) -> JsonDict:
    return {"text": text, **({"how": how} if how else {}), **({"run": run} if run else {})}


def _names(runs: Sequence[RunView]) -> list[Json]:
    pieces: list[Json] = []
    for place, run in enumerate(runs[:NAMED]):
        pieces += [_piece(" and ")] if place else []
        pieces.append(_piece(run.label, run=run.id))
    others = ", ".join(run.label for run in runs[NAMED:])
    return [*pieces, _piece(" and others", others)] if others else pieces


def _value(source: ReportInput, group: Sequence[RunView], name: str, found: tuple[float | None, list[RunView]]) -> Json:
    """Return the words of the best mean, with what the metric is, the interval, and who else is inside it.

    The mean of a run without competitors is neither the highest nor the lowest.
    """
    words, form = WORDS[name]
    value, best = found
    metric = MetricFacts.of(name, source.metrics[name])
    stored = best[0].metrics[name]
    how = [f"{metric.summary.rstrip('.')}." if metric.summary else "", f"{metric.direction.capitalize()} is better."]
    if stored.low is not None and stored.high is not None:
        how.append(f"95 % interval {form.format(stored.low)} to {form.format(stored.high)}.")
        inside = near(group, best, name)
        if inside:
            how.append(f"{inside} other {'policy has its' if inside == 1 else 'policies have their'} mean inside it.")
    rest = [(run.mean(name), run.label) for run in group if run not in best and run.mean(name) is not None]
    ordered = sorted(rest, key=lambda one: (one[0] or 0.0) * (-1 if metric.direction == "higher" else 1))
    if ordered:
        how.append(f"Second: {ordered[0][1]} with {form.format(ordered[0][0])}.")
    number, end = form.format(value), ENDS[metric.direction]
    text = f"the {end} {words} ({number})" if len(group) > 1 else f"{words} {number}"
    return _piece(text, " ".join(part for part in how if part))


def _held(group: Sequence[RunView]) -> list[Json]:
    """Return the keys held of those in a full cache, with where both numbers are from."""
    keys = span(group, "held_keys")
    if keys is None:
        return []
    first = group[0]
    sequences = first.replay.info.trace.sequences
    full = first.info.prefill is Prefill.full
    base = _range([one.prompt if full else one.length for one in sequences])
    share = (
        f", {first.budget} of the {'prompt' if full else 'text'} of {base} tokens" if "%" in str(first.budget) else ""
    )
    budget = f"The budget is {first.budget_keys or 0:.4g} keys in each key/value head{share}."
    steps = "the steps after the prompt" if full else "all steps"
    how = (
        f"{budget} {keys[0]:.0f} keys are held after a step, mean over {steps}; a full cache holds "
        f"{first.full_keys:.0f} there. The text has {_range([one.length for one in sequences])} tokens, "
        f"{_range([one.prompt for one in sequences])} of them prompt."
    )
    return [_piece(", "), _piece(f"{keys[0]:.0f} of {first.full_keys:.0f} keys held", how)]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def shown_groups(source: ReportInput) -> list[list[RunView]]:
    """Return groups by trace and prefill, then budget and kind; without bounds, nor open groups with a closed one.

    Traces are in the order of their replays.
    """
    groups = [group for group in source.groups.values() if group[0].kind != "bound"]
    closed = {_apart_from_loop(group[0]) for group in groups if group[0].protocol[1] == "closed"}
    shown = [group for group in groups if group[0].protocol[1] != "open" or _apart_from_loop(group[0]) not in closed]
    kinds = list(KINDS)
    traces = list(dict.fromkeys(run.protocol[0] for run in source.runs))

    def place(group: Sequence[RunView]) -> tuple[int, str, float | None, str, int, str]:
        identity, loop, prefill = group[0].protocol
        return traces.index(identity), prefill, group[0].budget_keys, loop, kinds.index(group[0].kind), group[0].phase

    return sorted(shown, key=place)


def _apart_from_loop(run: RunView) -> tuple[str, ...]:
    identity, _, prefill = run.protocol
    return (identity, prefill, run.phase, run.kind, run.budget or "")


def winners(group: Sequence[RunView], metric: MetricFacts) -> tuple[float | None, list[RunView]]:
    """Return the best mean and the runs that have it; a run without competitors is the best."""
    means = [(mean, run) for run in group if (mean := rounded(run.mean(metric.name))) is not None]
    if len(group) == 1 and means and metric.direction != "none":
        return means[0][0], list(group)
    found = best_among([(mean, run.id) for mean, run in means], metric.direction) if means else None
    return (None, []) if found is None else (found[0], [run for run in group if run.id in found[1]])


def near(group: Sequence[RunView], best: Sequence[RunView], metric: str) -> int:
    """Return how many other runs have a mean inside the interval of the best: their difference is not significant."""
    value = best[0].metrics[metric] if best else None
    if value is None or value.low is None or value.high is None:
        return 0
    low, high = value.low, value.high
    others = (run.mean(metric) for run in group if run not in best)
    return sum(mean is not None and low <= mean <= high for mean in others)


def span(runs: Sequence[RunView], metric: str) -> list[float] | None:
    """Return the smallest and the largest mean of some runs."""
    values = [value for run in runs if (value := rounded(run.mean(metric), 4)) is not None]
    return [min(values), max(values)] if values else None
