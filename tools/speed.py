"""The table of what things cost, from the figures under ``benchmarks/results``; part of README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILES = ("trace_cost", "replay_speed", "replay_runs", "closed_loop", "belady", "report_build")


def speed_table(results: Path) -> str | None:
    """Return the table, or None unless all benchmarks have left their figures."""
    if not all((results / f"{name}.json").is_file() for name in FILES):
        return None
    figures = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in FILES}
    rows = [
        *_tracing(figures["trace_cost"]),
        *_replay(figures["replay_speed"], figures["replay_runs"]),
        *_closed(figures["closed_loop"]),
        *_rest(figures["belady"], figures["report_build"]),
    ]
    machine = figures["closed_loop"]["machine"]
    head = f"| what | on {machine['cores']} cores ({machine['cpu']}) | figures |\n|---|---|---|"
    return "\n".join([head, *(f"| {what} | {found} | `{name}.json` |" for what, found, name in rows)])


Row = tuple[str, str, str]


def _tracing(figures: dict[str, Any]) -> Iterator[Row]:
    time, memory = figures["time"], figures["memory"][-1]
    tokens = f"{time['prompt']:,} + {time['new']} tokens"
    for kind, name in (
        ("maps", "store `maps`"),
        ("qkv", "store `qkv`"),
        ("eager", "eager with `output_attentions`, in memory"),
    ):
        yield f"tracing {tokens}, {name}", f"{_times(time['cpu'][f'{kind}_over_plain'])} plain generate", "trace_cost"
    shares = ", ".join(f"{memory[f'{kind}_of_eager']:.1%} (`{kind}`)" for kind in ("maps", "qkv"))
    what = f"memory above plain generate at {memory['prompt']:,} tokens, of what eager with `output_attentions` adds"
    yield what, shares, "trace_cost"


def _replay(speed: dict[str, Any], runs: dict[str, Any]) -> Iterator[Row]:
    found = speed["by_length"][-1]
    rates, ratios = found["million_updates_per_second"], found["ratios"]
    names = ", ".join(speed["policies"])
    yield (
        f"stepping {names} under eight budgets, {found['tokens']:,} tokens",
        f"{rates['stepping_24']:.0f} million score updates a second ({rates['stepping_24_torch']:.0f} in torch)",
        "replay_speed",
    )
    yield (
        "replaying these 24, files and all metrics included",
        f"{_times(ratios['replay_24_over_1'])} one",
        "replay_speed",
    )
    yield "reading the rows, share of that replay", f"{ratios['reading_of_replay_24']['median']:.0%}", "replay_speed"
    many = f"replaying {len(runs['many'])} policies under three budgets, all metrics"
    yield many, f"{_times(runs['ratio'])} {runs['one'].split()[0]} under one", "replay_runs"


def _closed(figures: dict[str, Any]) -> Iterator[Row]:
    ratios, tokens = figures["ratios"], f"{figures['tokens']:,} tokens"
    yield (
        f"closed loop of {figures['policy']}, {tokens}",
        f"{ratios['decoding_over_closed']['median']:.0f} times faster than decoding with it",
        "closed_loop",
    )
    yield (
        "closed loop of eight policies and budgets in one pass",
        f"{_times(ratios['8_mixed_over_1'])} one",
        "closed_loop",
    )


def _rest(belady: dict[str, Any], report: dict[str, Any]) -> Iterator[Row]:
    for row in belady["schedules"]:
        if row["tokens"] == 2048:
            found = f"{row['kvscope']['median']:.2f} s, scipy {row['scipy']['median']:.2f} s"
            yield f"the best schedule of a head, 2,048 tokens, {row['rows']} rows", found, "belady"
    tokens, page = list(report["tokens"].items())[-1]
    what = f"report of a 32 x 32 heads, {int(tokens):,} tokens"
    yield what, f"{page['page_mib']:.1f} MiB, open after {page['opened']['overview']:.1f} s", "report_build"


def _times(figure: dict[str, Any]) -> str:
    low, high = figure["range"]
    return f"{figure['median']:.2f} ({low:.2f} to {high:.2f}) times"
