"""``kvscope reproduce``: the experiments of papers, and whether their claims hold."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, Quiet
from kvscope.core.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from kvscope.experiments.plan import ExperimentPlan
    from kvscope.experiments.reproduce import Prepared


@command("reproduce", order=27)
@examples(
    "kvscope reproduce",
    "kvscope reproduce tova --dry-run",
)
def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Reproduce this paper. Default: list all.")] = None,
    model: Annotated[
        str, typer.Option("-m", "--model", help="Run demo, an alias such as llama2-7b, a Hub id or a folder.")
    ] = "demo",
    prompts: Annotated[
        list[str] | None, typer.Option("--prompts", metavar="FILE", help="Use these prompts as the paper's texts.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option("--gate", metavar="FILE", help="Gate of the model, for attention-gate.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what the command would do.")] = False,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="NAME", help="Name of the results. Default: reproduce-NAME."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Compute on cpu, cuda, cuda:1, mps. Default: a GPU if there is one.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Reproduce the claims of a paper: run its experiments, and compare the order of policies with the paper's.

    With the bundled model this takes minutes and needs no network, but the model is not the paper's, and texts are
    shorter. With another model the settings are the paper's, and --prompts gives the texts that do not come with
    kvscope. Nothing is computed twice. The results are reports/reproduce-NAME.json and a page for each experiment.
    """
    from kvscope.cli import console, places
    from kvscope.cli.reproduce_table import show_papers, show_reproduction

    with console.working("loading torch and transformers", quiet=quiet):
        from kvscope.experiments.paper import read_paper
        from kvscope.experiments.reproduce import Choices, prepare, reproduction, write_reproduction

    if name is None:
        show_papers(as_json=json)
        return
    if json and markdown:
        raise UsageError("--json and --markdown exclude each other", "Give one of them.")
    chosen = places.readable(output or f"reproduce-{name}")
    local = tuple(str(places.local_file(given, "prompts", quiet=quiet)) for given in prompts or [])
    prepared = prepare(read_paper(name), Choices(model, local, gate), chosen)
    plans = _plans(prepared, device)
    if dry_run:
        _show_plans(prepared, plans, as_json=json, quiet=quiet)
        return
    file = places.REPORTS / f"{chosen}.json"
    failed = _run(plans, file, force=force, quiet=quiet)
    record = reproduction(prepared, plans)
    write_reproduction(record, file)
    show_reproduction(record, file, as_json=json, markdown=markdown)
    if failed:
        raise typer.Exit(ExitStatus.error)


def _plans(prepared: Prepared, device: str | None) -> dict[str, ExperimentPlan]:
    from kvscope.cli import places
    from kvscope.experiments.cells import Store
    from kvscope.experiments.plan import make_plan

    store = Store.under(places.TRACES, places.REPORTS)
    return {part: make_plan(one, store, device or one.device) for part, one in prepared.experiments.items()}


def _show_plans(prepared: Prepared, plans: dict[str, ExperimentPlan], *, as_json: bool, quiet: bool) -> None:
    from kvscope.cli.console import note, show_json
    from kvscope.cli.experiment_table import plan_facts, show_facts
    from kvscope.experiments.reproduce import notes_of

    facts = {part: plan_facts(plan, quiet=quiet) for part, plan in plans.items()}
    if as_json:
        show_json({part: asdict(one) for part, one in facts.items()})
        return
    for part, one in facts.items():
        show_facts(plans[part], one)
    for line in (*notes_of(prepared), *(f"{part}: {why}" for part, why in prepared.missing.items())):
        note(line)


def _run(plans: dict[str, ExperimentPlan], file: Path, *, force: bool, quiet: bool) -> bool:
    """Run every experiment, write its summary and its page, and return whether anything failed."""
    from kvscope.cli import console, places
    from kvscope.cli.experiment_table import report_failures
    from kvscope.core.claim_records import REPRODUCTION
    from kvscope.experiments.run import require_output, run_here, summarise, write_summary
    from kvscope.report.experiment import write_page

    paths = {
        part: (places.REPORTS / f"{one.experiment.name}.json", places.REPORTS / f"{one.experiment.name}.html")
        for part, one in plans.items()
    }
    if file.exists() and not force:
        REPRODUCTION.header(file, example="Name another with -o.")
    for summary, page in paths.values():
        require_output(summary, [page], force=force)
    failed = False
    for part, plan in plans.items():
        with console.bar(plan.experiment.name, 100, "%", quiet=quiet) as update:
            result = run_here(plan, lambda share, title: update(100 * share, title))
        record = summarise(plan, result)
        summary, page = paths[part]
        write_summary(record, summary)
        failed |= report_failures(record)
        if record.runs:
            write_page(record, page)
            console.note(f"report: {page}", quiet=quiet)
    return failed
