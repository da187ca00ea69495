"""The findings of a reproduction as cells of a table, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.claim_records import Agreement, Finding, Reproduction, SettingValue
from kvscope.results.claims import named
from kvscope.results.render import escape_markdown

HEAD = ("claim", "where", "better; other", "metric", "paper", "here", "difference", "order")
ORDERS: tuple[Agreement, ...] = ("agrees", "differs", "not certain", "missing")


def cells(finding: Finding) -> tuple[str, ...]:
    """Return the cells of the columns `HEAD`."""
    claim = finding.claim
    worse = named(claim.worse) if claim.equal is None else f"{claim.worse.policy} at equal {spaced(claim.equal)}"
    metric = spaced(claim.metric) + (f" (paper: {claim.instead_of})" if claim.instead_of else "")
    return (
        claim.says,
        claim.where,
        f"{named(claim.better)}; {worse}",
        metric,
        values(claim.paper),
        values([one for one in (finding.better, finding.worse) if one is not None]),
        difference(finding),
        finding.agreement,
    )


def values(pair: Sequence[float]) -> str:
    """Return the values of the better and of the worse setting: ``7.41, 7.73``; a dash if there are none."""
    return ", ".join(number(one) for one in pair) or "-"


def number(value: float) -> str:
    """Return a value with three digits after the point below 1, and two above."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def difference(finding: Finding) -> str:
    """Return the difference with its 95 % interval and p: ``-0.32 (-0.40 to -0.25), p = 0.008``."""
    if finding.difference is None:
        return "-"
    text = f"{finding.difference:+.3f}"
    if finding.low is not None and finding.high is not None:
        text += f" ({finding.low:+.3f} to {finding.high:+.3f})"
    return text if finding.p is None else f"{text}, p = {finding.p:.2g}"


def spaced(name: str) -> str:
    """Return the name of a metric as a person reads it."""
    return name.replace("_", " ")


def verdict(record: Reproduction) -> str:
    """Return in a sentence how many claims hold."""
    counts = [f"{record.count(one)} {one}" for one in ORDERS if record.count(one)]
    total = len(record.findings)
    return f"Of {total} {'claim' if total == 1 else 'claims'}: {', '.join(counts)}."


def remarks(record: Reproduction, *, bundled: bool) -> list[str]:
    """Return what is to be said of single claims: what is missing, and why the bundled model gives another result."""
    found: dict[str, list[str]] = {}
    for count, finding in enumerate(record.findings, 1):
        if finding.why:
            found.setdefault(finding.why, []).append(str(count))
        if bundled and finding.claim.bundled and finding.agreement in ("differs", "not certain"):
            found.setdefault(finding.claim.bundled, []).append(str(count))
    return [f"{', '.join(numbers)}: {text}" for text, numbers in found.items()]


def markdown(record: Reproduction, *, bundled: bool) -> str:
    """Return a reproduction as Markdown: notes, the table, and remarks on single claims."""
    lines = [f"## {record.name}", "", f"{escape_markdown(record.title)}. {record.source}.", ""]
    lines += [f"- {escape_markdown(note)}" for note in record.notes]
    lines += ["", f"| | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 1) + "|"]
    for count, finding in enumerate(record.findings, 1):
        lines.append(f"| {count} | {' | '.join(escape_markdown(cell) for cell in cells(finding))} |")
    lines += ["", verdict(record), ""]
    said = remarks(record, bundled=bundled)
    lines += [*(f"- {escape_markdown(line)}" for line in said), *([""] if said else [])]
    for part, metric in dict.fromkeys((one.part, one.metric) for one in record.values):
        lines += _every(part, metric, [one for one in record.values if (one.part, one.metric) == (part, metric)])
    return "\n".join(lines)


def _every(part: str, metric: str, of: Sequence[SettingValue]) -> list[str]:
    """Return the lines of a table of every setting: a row for each policy, a column for each budget."""
    budgets = [budget for budget in dict.fromkeys(one.setting.budget for one in of) if budget is not None]
    heads = budgets or ["no budget"]
    title = spaced(metric)
    lines = [f"{title[:1].upper()}{title[1:]} of every policy ({part}), with its 95 % interval:", ""]
    lines += [f"| policy | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for policy in dict.fromkeys(one.setting.policy for one in of):
        own = {one.setting.budget: one for one in of if one.setting.policy == policy}
        row = [own.get(None, own.get(budget)) for budget in budgets or [""]]
        lines.append(f"| {escape_markdown(policy)} | {' | '.join(map(_with_interval, row))} |")
    return [*lines, ""]


def _with_interval(value: SettingValue | None) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return number(value.mean)
    return f"{number(value.mean)} ({number(value.low)} to {number(value.high)})"
