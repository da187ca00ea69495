"""Papers and what became of their claims, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvscope.cli.console import ALWAYS, Column, show_json, show_pairs, show_raw, show_table

if TYPE_CHECKING:
    from pathlib import Path

    from kvscope.core.claim_records import Reproduction

# How late each column of `claims_table.HEAD` is dropped on a narrow terminal, and the width to which it may be wrapped.
_KEEP = (ALWAYS, 60, 70, 50, 90, 95, 80, ALWAYS)
_WRAP = (18, 12, 18, 10, 7, 7, 12, 0)


def show_papers(*, as_json: bool) -> None:
    """Print the papers that can be reproduced."""
    from kvscope.experiments.paper import paper_names, read_paper

    papers = [read_paper(name) for name in paper_names()]
    if as_json:
        show_json(
            [
                {
                    "name": one.name,
                    "title": one.title,
                    "source": one.source,
                    "about": one.about,
                    "model": one.model,
                    "claims": len(one.claims),
                    "parts": {name: {"about": part.about, "prompts": part.texts} for name, part in one.parts.items()},
                }
                for one in papers
            ]
        )
        return
    texts = ["; ".join(part.texts for part in one.parts.values() if part.texts) or "-" for one in papers]
    show_table(
        [
            Column("paper", [one.name for one in papers]),
            Column("source", [one.source for one in papers], keep=70),
            Column("what it claims", [one.about for one in papers], wrap=30),
            Column("its model", [one.model for one in papers], keep=80),
            Column("--prompts for its model", texts, keep=60, wrap=24),
        ],
        notes=["kvscope reproduce NAME runs the bundled model; with --model, the settings are the paper's."],
    )


def show_reproduction(record: Reproduction, file: Path, *, as_json: bool, markdown: bool) -> None:
    """Print what became of each claim."""
    from kvscope.core.claim_records import REPRODUCTION
    from kvscope.model.names import DEMO
    from kvscope.results import claims_table

    bundled = record.model == DEMO
    if as_json:
        show_json(REPRODUCTION.plain(record))
        return
    if markdown:
        show_raw(claims_table.markdown(record, bundled=bundled))
        return
    show_pairs([("paper", f"{record.title}, {record.source}"), ("model", record.model)], title=str(file))
    rows = [claims_table.cells(finding) for finding in record.findings]
    numbers = Column("", [str(count) for count in range(1, len(rows) + 1)], numeric=True)
    columns = [
        Column(header, [row[place] for row in rows], keep=_KEEP[place], wrap=_WRAP[place])
        for place, header in enumerate(claims_table.HEAD)
    ]
    notes = [
        claims_table.verdict(record),
        "Values: first the setting that the paper calls better, then the other one. here: means over sequences.",
        "An order is certain if both the sign test (p <= 0.05) and the 95 % interval of the difference show it.",
        *record.notes,
        *claims_table.remarks(record, bundled=bundled),
    ]
    show_table([numbers, *columns], notes=notes)
