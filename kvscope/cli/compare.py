"""``kvscope compare``: whether one policy is better than another on the same sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.completion import metric_names, policy_names, replay_names
from kvscope.cli.options import Json, Quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.analysis.compare import ComparisonRow
    from kvscope.cli.console import Column
    from kvscope.results.store import Replay

NOTE = (
    "B - A: mean over sequences, with its 95 % bootstrap interval, near-copies drawn together. p: exact sign test. "
    "better: only if interval and test agree. By chance alone, one row in 20 has p <= 0.05."
)


@command("compare", order=110)
@examples(
    "kvscope compare --policy h2o --policy tova",
    "kvscope compare old-replay new-replay --metric output_error",
)
def compare(
    replays: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REPLAY",
            autocompletion=replay_names,
            help="Compare two policies of one replay, or of two replays of the same trace. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="POLICY",
            autocompletion=policy_names,
            help="Name A, then B, by label, name or run number. For one policy in two replays, name it once.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=metric_names,
            help="Compare this metric. Repeatable. Default: all that have a better direction.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two policies on the same sequences, at every budget that both ran under.

    The sign test counts the sequences in which B is above A; near-copies count as one. The command warns if it finds
    near-copies, or if there are too few sequences for any claim.
    """
    from kvscope.analysis.compare import compare as run
    from kvscope.cli import console, places
    from kvscope.core.errors import UsageError
    from kvscope.results.store import open_replay

    if len(replays or ()) > 2:
        raise UsageError(f"{len(replays or ())} replays are given", "Name one replay or two.")
    named: list[str | None] = [*replays] if replays else [None]
    opened = [open_replay(places.find_replay(name, quiet=quiet)) for name in named]
    chosen = _policies(opened, policy or [])
    found = run((opened[0], chosen[0]), (opened[-1], chosen[1]), metric)
    if json:
        console.show_json(found.to_dict())
    elif found.rows:
        console.show_table(columns(found.rows), title=f"A = {found.a}, B = {found.b}", notes=[NOTE])
    else:
        console.show_text(f"A = {found.a}, B = {found.b}: nothing was evicted, so there is nothing to compare.")
    for warning in found.warnings:
        console.warn(warning)


def columns(rows: Sequence[ComparisonRow]) -> list[Column]:
    """Return the columns of the comparison; a budget is shown in its first row only."""
    from kvscope.cli.console import Column
    from kvscope.results.render import number

    budgets = [f"{row.budget} {row.loop}" for row in rows]
    both = [row.paired for row in rows]
    counts = [f"{item.above} of {item.clusters}" for item in both]
    unit = next((item.unit for item in both if item.unit != "sequence"), "sequence")
    intervals = ["-" if item.low is None else f"{item.low:+.4f}..{item.high:+.4f}" for item in both]
    return [
        Column("budget", [name if name not in budgets[:index] else "" for index, name in enumerate(budgets)]),
        Column("metric", [row.metric for row in rows]),
        Column("A", [number(item.mean_a) for item in both], keep=50, numeric=True),
        Column("B", [number(item.mean_b) for item in both], keep=51, numeric=True),
        Column("B - A", [number(item.difference, sign=True) for item in both], numeric=True),
        Column("95 %", intervals, keep=60, numeric=True),
        Column(f"B above A\nin {unit}s", counts, keep=40, numeric=True),
        Column("p", [f"{item.p:.2g}" for item in both], numeric=True),
        Column("smallest\np possible", [f"{item.smallest_p:.2g}" for item in both], keep=30, numeric=True),
        Column("better", [row.better or "-" for row in rows]),
    ]


def _policies(replays: Sequence[Replay], given: Sequence[str]) -> tuple[str, str]:
    """Return A and B: the named policies, or the only two of these replays."""
    from kvscope.analysis.compare import policies
    from kvscope.core.errors import UsageError

    if len(given) == 2:
        return given[0], given[1]
    if len(given) > 2:
        raise UsageError(f"{len(given)} policies are given", "Name two: --policy A --policy B")
    if len(replays) == 2:
        known = [given or policies(replay) for replay in replays]
        if all(len(names) == 1 for names in known):
            return known[0][0], known[1][0]
    elif not given and len(names := policies(replays[0])) == 2:
        return names[0], names[1]
    known_names = list(dict.fromkeys(name for replay in replays for name in policies(replay)))
    raise UsageError(
        "compare needs the names of two policies", f"Name two of these with --policy: {', '.join(known_names)}"
    )
