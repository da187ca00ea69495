"""Write the generated parts of the documentation, and check commands, links and tables in it.

python tools/docs.py           write the file formats from the schemas, the pages of commands and policies from the
                               code, and the tables of results from the figures
python tools/docs.py --check   change nothing; print every problem, and end with status 1 if there is any
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer

from kvscope import __version__
from kvscope.cli.app import program
from kvscope.core.claim_records import REPRODUCTION, Reproduction
from kvscope.experiments import describe as experiments
from kvscope.experiments import describe_papers as papers
from kvscope.model import known_types
from kvscope.policies.describe import describe
from kvscope.presses import describe as presses
from kvscope.results import schema as results
from kvscope.results.statistics import LEVEL
from kvscope.trace import describe as trace
from kvscope.trace.schema import STORES
from kvscope.trace.space import estimate_bytes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # also when a test loads this file by its path
import command_pages  # noqa: E402
import concept_figures  # noqa: E402
import doc_links  # noqa: E402
import policy_pages  # noqa: E402

GENERATED: dict[str, Callable[[], str]] = {
    "traces/README.md": trace.describe,
    "reports/README.md": results.describe,
    "docs/models.md": known_types.describe,
    "docs/experiments.md": experiments.describe,
    "docs/kvpress.md": presses.describe,
    "docs/reproduce.md": lambda: papers.describe(reproductions()),
}
RESULTS = Path("benchmarks/results")
OUTCOMES, GATES, OPERATIONS = (RESULTS / f"{name}.json" for name in ("outcomes", "gates", "operations"))
MEASURED = ("trace_cost", "replay_speed", "replay_runs", "closed_loop", "decoding", "belady", "report_build")
SEVEN = {"layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128}  # the shape of Llama-2-7B
GPU = ("gpu_2048.json", "gpu.json")
DEEP = 32  # layers of the model in the table of operations
STEPPERS = {
    "TritonStepper": "a Triton kernel, a block of tokens at once",
    "TorchStepper": "torch, token by token",
    "AppendingStepper": "not stepped: it evicts nothing",
}
Row = tuple[str, str, str]  # what, the figure, and the name of its file
SHOWN = "20%"  # budget of the table of outcomes
WITH_TABLES = {  # page -> the tables that it must have, between marks
    "docs/outcomes.md": ("outcomes", "agreement"),
    "docs/gates.md": ("gates",),
    "docs/gpu.md": ("operations",),
    "docs/speed.md": ("speed",),
    "docs/start.md": ("seven",),
}


def main() -> int:
    """Return the exit status."""
    if "--check" not in sys.argv[1:]:
        for name, text in generated().items():
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_text(text, encoding="utf-8")
        for stale in set((ROOT / policy_pages.FOLDER).iterdir()) - {ROOT / name for name in generated()}:
            stale.unlink()
        for name in WITH_TABLES:
            page = (ROOT / name).read_text(encoding="utf-8")
            (ROOT / name).write_text(with_tables(name, page), encoding="utf-8")
    wrong = list(problems())
    for line in wrong:
        print(line)
    print(f"docs: {len(wrong)} problems" if wrong else "docs: fine")
    return 1 if wrong else 0


def reproductions() -> list[Reproduction]:
    """Return what the bundled model gave of each paper."""
    files = sorted((ROOT / RESULTS).glob("reproduce-*.json"))
    return [REPRODUCTION.read(file, Reproduction, example="Write it with kvscope reproduce.") for file in files]


@cache
def generated() -> dict[str, str]:
    """Return the text of every generated file by its path."""
    return (
        {name: text() for name, text in GENERATED.items()}
        | command_pages.pages()
        | concept_figures.pages()
        | policy_pages.pages()
    )


def problems() -> Iterator[str]:
    """Yield a line for every statement in the documentation that is wrong."""
    for name, text in generated().items():
        if not (ROOT / name).is_file() or (ROOT / name).read_text(encoding="utf-8") != text:
            yield f"{name}: differs from the schema; run: python tools/docs.py"
    for name in WITH_TABLES:
        page = (ROOT / name).read_text(encoding="utf-8")
        if with_tables(name, page) != page:
            yield f"{name}: a table differs from what it is made of; run: python tools/docs.py"
    for name in doc_links.documents():
        text = (ROOT / name).read_text(encoding="utf-8")
        yield from (f"{name}: {line}" for line in doc_links.broken(ROOT / name, text))
        yield from (f"{name}: {line}" for line in _commands(text))
    if f"\n## {__version__}\n" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield f"CHANGELOG.md: no entry for {__version__}"


def with_tables(name: str, page: str) -> str:
    """Return a page with its generated tables between their marks, which it must have."""
    made = tables()
    for table in WITH_TABLES[name]:
        before, begin, rest = page.partition(f"<!-- {table} -->")
        _, end, after = rest.partition(f"<!-- /{table} -->")
        assert begin and end, f"{name} has no place for the table of {table}"
        page = f"{before}{begin}\n\n{made[table]}\n\n{end}{after}"
    return page


@cache
def tables() -> dict[str, str]:
    """Return the tables that are made of the results of benchmarks, by name."""
    outcomes, gates, operations = (
        json.loads((ROOT / file).read_text(encoding="utf-8")) for file in (OUTCOMES, GATES, OPERATIONS)
    )
    return {
        "outcomes": outcomes_table(outcomes),
        "agreement": agreement_table(outcomes),
        "gates": gates_table(gates),
        "operations": operations_table(operations),
        "speed": speed_table(ROOT / RESULTS),
        "seven": seven_table(*(json.loads((ROOT / RESULTS / name).read_text()) for name in GPU)),
    }


def outcomes_table(figures: dict[str, Any]) -> str:
    """Return perplexity ratio, share of right answers and keys of every policy at one budget, under both prefills."""
    lines = [
        "| policy | perplexity ratio | right answers | held | perplexity ratio | right answers | held | read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    both = [
        {row["policy"]: row for row in figures[prefill]["rows"] if row["budget"] in (SHOWN, None)}
        for prefill in ("stream", "full")
    ]
    for name in sorted(both[0] | both[1]):
        stream, full = (rows.get(name) for rows in both)
        cells = [_outcome(stream), _right(stream), _keys(stream, "held_keys")]
        cells += [_outcome(full), _right(full), _keys(full, "held_keys"), _keys(full, "read_keys")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement_table(figures: dict[str, Any]) -> str:
    """Return the rank agreement of every cheap metric with the outcomes, under both prefills."""
    half = "text | at 20 % | answers | at 20 %"
    lines = [f"| metric | {half} | {half} |", "|---|---|---|---|---|---|---|---|---|"]
    both = [(figures[prefill]["rank_agreement"], figures[prefill]["within_a_budget"]) for prefill in ("stream", "full")]
    first = both[0][0]
    for name in sorted(first, key=lambda name: abs(first[name]["perplexity_ratio"] or 0), reverse=True):
        cells = []
        for found, within in both:
            of, alone = found.get(name, {}), within.get(name, {}).get(SHOWN, {})
            cells += [of.get("perplexity_ratio"), alone.get("perplexity_ratio")]
            cells += [of.get("recall_of_its_own"), alone.get("recall")]
        lines.append(f"| {name} | {' | '.join('-' if cell is None else f'{cell:+.2f}' for cell in cells)} |")
    return "\n".join(lines)


def gates_table(figures: dict[str, Any]) -> str:
    """Return perplexity and recall of each gate, and of policies that hold as many keys."""
    lines = [
        "| gate | policy | keeps | text, streamed | text, continued | right answers |",
        "|---|---|---|---|---|---|",
    ]
    for entry in figures["gates"]:
        parts = {
            key: {row["policy"]: row for row in entry[key]} for key in ("text", "continued", "recall") if key in entry
        }
        for name in (name for name in parts["recall"] if name != "full"):
            text, continued, recall = (parts.get(key, {}).get(name) for key in ("text", "continued", "recall"))
            keeps = (text or continued)["keep"]
            cells = [_beside(text, "ratio"), _beside(continued, "ratio"), _beside(recall, "recall")]
            lines.append(f"| {Path(entry['gate']).stem} | `{name}` | {keeps:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def operations_table(figures: dict[str, Any]) -> str:
    """Return what one more token costs on a GPU under every policy, in operations and waits."""
    lines = [
        "| policy | stepped by | a token | a token of the prompt | waits | in `verify` | times generate | waits |",
        "|---|---|---|---|---|---|---|---|",
        f"| plain generate | - | - | - | - | {' | '.join(_in_verify(figures['generate'], figures['generate']))} |",
    ]
    for name, found in figures["policies"].items():
        token = found.get("token") or found["open_token"]
        stepper = STEPPERS[found["stepper"]] + (", in replays only" if "open_token" in found else "")
        together = found.get("token_of_4_runs_and_twice_the_heads", token) == token
        prompt = _count(found["prompt_token"]["operations"]) if "prompt_token" in found else "-"
        cells = [
            f"`{name}`",
            stepper if together else f"{stepper}, runs or heads one by one",
            _count(token["operations"]),
            prompt,
            _count(token["waits"]),
            *_in_verify(found.get("decoding"), figures["generate"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_verify(found: dict[str, Any] | None, generate: dict[str, Any]) -> list[str]:
    """Return the operations of a decoded token, their ratio to plain generation, and the waits."""
    if found is None:
        return ["-", "-", "-"]
    if "each_layer" in found:
        layers, said = DEEP, f"{_count(_deep(found, 1, once=0))} + {_count(_deep(found, 0))}"
        cost, waits = _deep(found, DEEP), _deep(found, DEEP, "waits")
    else:
        ((name, whole),) = found.items()
        layers = int(name.split("_")[1])
        cost, waits, said = whole["operations"], whole["waits"], f"{_count(whole['operations'])} in {layers} layers"
    return [said, f"{cost / _deep(generate, layers):.1f}", _count(waits)]


def _deep(found: dict[str, Any], layers: int, name: str = "operations", once: int = 1) -> float:
    """Return the cost of a token in so many layers, with or without what it costs once."""
    return float(layers * found["each_layer"][name] + once * found["all_layers"][name])


def _count(number: float) -> str:
    return f"{number:.0f}"


def speed_table(results: Path) -> str:
    """Return the table of speed, from the files that the benchmarks wrote."""
    figures = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in MEASURED}
    rows = [
        *_tracing(figures["trace_cost"]),
        *_replay(figures["replay_speed"], figures["replay_runs"]),
        *_closed(figures["closed_loop"]),
        *_decoded(figures["decoding"]),
        *_rest(figures["belady"], figures["report_build"]),
    ]
    machine = figures["closed_loop"]["machine"]
    head = f"| what | on {machine['cores']} cores ({machine['cpu']}) | figures |\n|---|---|---|"
    return "\n".join([head, *(f"| {what} | {found} | `{name}.json` |" for what, found, name in rows)])


def seven_table(long: dict[str, Any], short: dict[str, Any]) -> str:
    """Return what a model of 7 billion parameters takes: time and memory measured, disk estimated."""
    sections = [*short["sections"], *long["sections"]]
    found = {section["label"]: section["figures"] for section in sections if section["status"] == "done"}
    traced, replayed = found["tracing llama2-7b"], found["replaying llama2-7b"]
    one, eight = found["closed loop llama2-7b 2048"], found["closed loop of eight llama2-7b 2048"]
    tokens = f"{traced['prompt']:,} + {traced['new']} tokens"
    rows = []
    for store in ("qkv", "maps"):
        seconds, memory = traced["seconds"][store]["median"], traced["peak_mib_above_model"][store]
        space = estimate_bytes(
            **SEVEN, lengths=[traced["prompt"] + traced["new"]], stored=STORES[store], number_bytes=2
        )
        rows.append(f"| `trace --store {store}`, {tokens} | {seconds:.0f} s | {_gb(memory)} | {space / 1e9:.1f} GB |")
    layers, seconds = replayed["layers"], replayed["seconds"]["device"]["median"]
    runs = len(replayed["policies"]) * len(replayed["budgets"].split(","))
    rows.append(
        f"| `replay`, {runs} runs with all metrics, {layers} of {SEVEN['layers']} layers | {seconds:.1f} s | "
        f"{_gb(replayed['peak_mib'])} | small |"
    )
    for name, figures in (("one policy", one), ("eight runs in one pass", eight)):
        seconds, memory = (
            figures["seconds"]["closed_metrics"]["median"],
            figures["peak_mib_above_model"]["closed_metrics"],
        )
        rows.append(
            f"| closed loop of 2,048 tokens with all metrics, {name} | {seconds:.1f} s | {_gb(memory)} | small |"
        )
    return "\n".join(["| what | time | GPU memory besides the model | disk |", "|---|---|---|---|", *rows])


def _gb(mebibytes: float) -> str:
    return f"{mebibytes * 2**20 / 1e9:.1f} GB"


def _tracing(figures: dict[str, Any]) -> Iterator[Row]:
    time, memory = figures["time"], figures["memory"][-1]
    tokens = f"{time['prompt']:,} + {time['new']} tokens"
    for kind, name in (
        ("maps", "store `maps`"),
        ("qkv", "store `qkv`"),
        ("eager", "eager with `output_attentions`, in memory"),
    ):
        yield f"tracing {tokens}, {name}", f"{_times(time['wall'][f'{kind}_over_plain'])} plain generate", "trace_cost"
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
    for key, what in (
        ("8_mixed_over_1", "closed loop of eight policies and budgets in one pass"),
        ("8_mixed_over_1_as_commands", "`kvscope perplexity` with these eight, start of the program included"),
    ):
        yield what, f"{_times(ratios[key])} one", "closed_loop"


def _decoded(figures: dict[str, Any]) -> Iterator[Row]:
    found = f"{_times(figures['ratios']['decoding_over_generate'])} plain generate"
    yield (
        f"decoding {figures['tokens']:,} tokens under {figures['policy']}, keys removed from the cache",
        found,
        "decoding",
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


def _beside(row: dict[str, Any] | None, name: str) -> str:
    """Return a figure with its interval, and with a star where it differs from the gate's."""
    if row is None:
        return "-"
    (low, high), (least, most) = row["interval"], row["than_gate_interval"]
    apart = row["p"] <= LEVEL and not least <= 0 <= most
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f}){'*' if apart else ''}"


def _outcome(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['perplexity_ratio']:.3f}"


def _right(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['recall']['all']:.2f}"


def _keys(row: dict[str, Any] | None, name: str) -> str:
    return "-" if row is None else f"{row[name]:.0f}"


@cache
def _known() -> tuple[dict[str, Any], set[str]]:
    """Return every command and group by name, and the names of all parameters of policies."""
    commands: dict[str, Any] = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
    return commands, {item["name"].replace("_", "-") for row in describe() for item in row["parameters"]}


def _commands(text: str) -> Iterator[str]:
    """Yield unknown commands and options in code blocks and in backticks."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ").splitlines()
    quoted = [line for line in re.findall(r"`(kvscope [^`]*)`", text) if not line.endswith("=")]
    # parameters of classes that the page itself defines
    own = {name.replace("_", "-") for name in re.findall(r"^    (\w+): .* = parameter\(", text, re.MULTILINE)}
    known, parameters = _known()
    for line in [*(line for line in blocks if line.startswith("kvscope ")), *quoted]:
        words = shlex.split(line, comments=True)
        if len(words) < 2:
            continue
        command = known.get(words[1])
        if len(words) > 2 and hasattr(command, "commands"):
            command = command.commands.get(words[2])
        if command is None:
            yield f"{line!r}: there is no command {words[1]}"
            continue
        flags = {flag for item in command.params for flag in item.opts}
        if words[1] == "replay":
            flags |= {f"--{name}" for name in parameters | own}
        for word in words[2:]:
            if word.startswith("-") and word.partition("=")[0] not in flags:
                yield f"{line!r}: {words[1]} has no option {word}"


if __name__ == "__main__":
    sys.exit(main())
