"""``kvscope run``: an experiment of models, tasks, policies and budgets, from one file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, Quiet
from kvscope.core.errors import ExitStatus, UsageError
from kvscope.core.registry import nearest

if TYPE_CHECKING:
    from kvscope.experiments.execute import UnitResult
    from kvscope.experiments.experiment import Experiment
    from kvscope.experiments.plan import ExperimentPlan

LOCAL, RAY = "local", "ray"


@command("run", order=25)
@examples(
    "kvscope run experiment.yaml --dry-run",
    "kvscope run experiment.yaml",
)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Run this experiment: YAML, or TOML in a .toml file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the command would do.")] = False,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="NAME", help="Name of the results in reports/. Default: the file's."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Compute on cpu, cuda, cuda:1, mps. Default: as in the file.")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on", metavar="local|ray", help="Where to run. Default: local, or ray if the file has that key."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment: models x tasks x policies x budgets, from prompts to one table and one report.

    Nothing is computed twice: an interrupted experiment continues, and after a change in the file only what depends on
    it is computed again. Paths in the file are relative to the current folder. The results are reports/NAME.json and
    reports/NAME.html; traces and replays are in traces/cells and reports/cells.
    """
    from kvscope.cli import console, places
    from kvscope.cli.experiment_table import report_failures, show_experiment, show_plan

    experiment, place = _read(file, on, dry_run=dry_run, quiet=quiet)
    with console.working("loading transformers", quiet=quiet):
        from kvscope.experiments.cells import Store
        from kvscope.experiments.plan import make_plan
        from kvscope.experiments.run import require_output, summarise, write_summary
        from kvscope.report.experiment import write_page

    local = tuple(str(places.local_file(given, "prompts", quiet=quiet)) for given in experiment.prompts)
    experiment = replace(experiment, name=(name := places.readable(output or experiment.name)), prompts=local)
    plan = make_plan(experiment, Store.under(places.TRACES, places.REPORTS), device or experiment.device)
    if dry_run:
        show_plan(plan, as_json=json, quiet=quiet)
        return
    summary, page = places.REPORTS / f"{name}.json", places.REPORTS / f"{name}.html"
    pages = [page] if "report" in experiment.steps else []
    require_output(summary, pages, force=force)
    result = _made(plan, place, quiet)
    record = summarise(plan, result)
    write_summary(record, summary)
    show_experiment(record, summary, as_json=json)
    failed = report_failures(record)  # before the page, whose disk may be full
    if pages and record.runs:
        write_page(record, page)
        console.note(f"report: {page}", quiet=quiet)
    if failed:
        raise typer.Exit(ExitStatus.error)


def _read(file: Path, on: str | None, *, dry_run: bool, quiet: bool) -> tuple[Experiment, str]:
    """Return the experiment and where it runs; a wrong place, or a missing Ray, is named before the slow imports."""
    from kvscope.cli import console

    if on not in (None, LOCAL, RAY):
        raise UsageError(f"an experiment cannot run on {on!r}", nearest(on, [LOCAL, RAY]))
    with console.working("loading torch", quiet=quiet):
        from kvscope.experiments.ray_package import load_ray
        from kvscope.experiments.spec import read_experiment

    experiment = read_experiment(file)
    place = on or (RAY if experiment.ray else LOCAL)
    if place == RAY and not dry_run:
        load_ray()
    return experiment, place


def _made(plan: ExperimentPlan, place: str, quiet: bool) -> UnitResult:
    """Make what is not done, and return what failed."""
    from kvscope.cli import console
    from kvscope.experiments.on_ray import run_on_ray
    from kvscope.experiments.run import run_here

    with console.bar(plan.experiment.name, 100, "%", quiet=quiet) as bar:

        def update(share: float, title: str) -> None:
            bar(100 * share, title)

        if place == RAY:
            return run_on_ray(plan, plan.experiment.ray, update, console.warn)
        return run_here(plan, update)
