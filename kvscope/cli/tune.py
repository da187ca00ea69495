"""``kvscope tune``: search the parameters that suit a model, a layer or a head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvscope.cli.command import command, examples
from kvscope.cli.options import (
    Device,
    Force,
    Grid,
    HeldOut,
    Json,
    Level,
    NoVerify,
    OneBudget,
    PrefillMode,
    Quiet,
    Scope,
    TomlFile,
    TraceNames,
    TunedMetric,
    TunedPolicy,
)
from kvscope.core.options import Prefill, TuneLevel, TuneOptions

if TYPE_CHECKING:
    from kvscope.results.statistics import Paired
    from kvscope.tune.result import Tuning


@command("tune", order=50)
@examples(
    "kvscope tune --policy a2sf -o a2sf.toml",
    "kvscope tune my-trace -p a2sf --grid alpha=0.1,0.5,0.9 -o a2sf.toml",
)
def tune(
    traces: TraceNames = None,
    policy: TunedPolicy = "a2sf",
    grid: Grid = None,
    per: Level = TuneLevel.head,
    budget: OneBudget = "20%",
    metric: TunedMetric = "retained_mass",
    prefill: PrefillMode = Prefill.full,
    scope: Scope = None,
    held_out: HeldOut = None,
    output: TomlFile = Path("tuned.toml"),
    device: Device = "auto",
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search a policy's parameters on recorded attention, and measure the gain on held-out sequences.

    Use the resulting file with --policy a2sf:@tuned.toml. Without TRACE, the newest complete one under traces/ is used.
    """
    from kvscope.cli import console, places
    from kvscope.cli.hints import replay_of
    from kvscope.core.errors import UsageError
    from kvscope.core.output import replace_file, require_free

    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output} cannot be written", "Name a file in a folder that exists: -o tuned.toml")
    require_free(output, force=force)
    with console.working("loading torch", quiet=quiet):
        from kvscope.trace.reader import open_trace
        from kvscope.tune.compile import compile_tune
        from kvscope.tune.result import to_toml

    opened = [open_trace(places.find_trace(name, quiet=quiet), compare=not no_verify) for name in traces or ()]
    opened = opened or [open_trace(places.find_trace(None, quiet=quiet), compare=not no_verify)]
    tokens = 2 * sum(sequence.length for trace in opened for sequence in trace.sequences)
    options = TuneOptions(per, metric, prefill, held_out, output.name, device, scope)
    job = compile_tune(opened, policy, _grid(policy, grid or []), budget, options)
    with console.bar("tuning", tokens, "tokens", quiet=quiet) as update:
        found = job.execute(lambda share: update(share * tokens))
    replace_file(output, to_toml(found).encode(), force=force)
    _show(found, output, as_json=json)
    if not json:
        spec = f"{_name(policy)}:@{output}"
        console.note(f"next: {replay_of(spec, traces or (), prefill, scope)}", quiet=quiet)


def _grid(policy: str, given: list[str]) -> dict[str, list[str]]:
    from kvscope.core.errors import UsageError
    from kvscope.tune.compile import usual_grid

    if not given:
        return usual_grid(policy)
    grid: dict[str, list[str]] = {}
    for text in given:
        flag, _, values = text.partition("=")
        name = flag.strip().lstrip("-").replace("-", "_")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not name or not listed or name in grid:
            raise UsageError(
                f"--grid {text!r} is not a list of values of one parameter", "Write --grid alpha=0.1,0.5,0.9"
            )
        grid[name] = listed
    return grid


def _name(policy: str) -> str:
    """Return the name of a policy without its parameters: ``a2sf``, or ``mine.py:Mine``."""
    found = re.match(r"\s*(.+?\.py:\w+|[\w-]+)", policy)
    assert found is not None, f"{policy} was tuned"
    return found[1]


def _show(found: Tuning, output: Path, *, as_json: bool) -> None:
    from kvscope.cli.console import Column, show_json, show_table

    about, gain = found.about, found.gain
    if as_json:
        data: dict[str, object] = {
            **about,
            "searched": {name: _mean(values) for name, values in found.searched.items()},
            "held_out": {name: _mean(values) for name, values in found.held_out.items()},
            "best": found.best.label,
            "hindsight": found.hindsight.label,
            "gain": {"mean": gain.difference, "low": gain.low, "high": gain.high, "p": gain.p},
            "settings": [policy.parameters() for policy in found.policy.settings],
            "layers": found.policy.layers,
            "choice": found.policy.choice,
            "file": str(output),
        }
        show_json(data)
        return
    rows = [
        (found.policy.label, found.searched["tuned"], found.held_out["tuned"], "tuned"),
        (found.best.label, found.searched["best"], found.held_out["best"], "best single"),
        (found.hindsight.label, None, found.held_out["hindsight"], "best single in hindsight"),
    ]
    columns = [
        Column("setting", [row[0] for row in rows], wrap=20),
        Column("what it is", [row[3] for row in rows], wrap=12),
        Column(f"searched ({about['searched_sequences']})", [_cell(row[1]) for row in rows], numeric=True),
        Column(f"held out ({about['held_out_sequences']})", [_cell(row[2]) for row in rows], numeric=True),
    ]
    scope = f", which decides per {about['scope']}" if "scope" in about else ""
    what = f"{about['metric']} at {about['budget']}, {about['prefill']} prefill, open loop; "
    what += f"a setting per {about['per']} of {about['policy']}{scope}." if scope else f"a setting per {about['per']}."
    show_table(columns, title=str(output), notes=[what, *_verdict(gain)])


def _verdict(gain: Paired) -> list[str]:
    """Return the lines about the gain on the held-out sequences, and how certain it is."""
    difference = gain.difference or 0.0
    verdict = "scores higher" if difference > 0 else "does not score higher"
    spread = "" if gain.low is None else f", 95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
    lines = [
        f"Held out, tuned {verdict} than the best single setting: gain {difference:+.4f}{spread}, p = {gain.p:.2g}."
    ]
    if gain.warning:
        lines.append(gain.warning[0].upper() + gain.warning[1:] + ".")
    elif not gain.significant:
        lines.append("On these sequences, the difference is not significant.")
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cell(values: list[float] | None) -> str:
    return "-" if values is None else f"{_mean(values):.4f}"
