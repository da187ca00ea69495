"""Document experiments: every key of their files, and the summary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields

from kvscope.core import experiment_records as records
from kvscope.core.json_records import described
from kvscope.experiments.experiment import Experiment, ModelEntry

EXAMPLE = """\
model: demo
tasks: ["needle:wording=notes", variable-tracking, key-value]
lengths: [256, 512]
examples: 10
policies: [h2o, tova, streaming-llm, snapkv, {a2sf: {alpha: [0.7, 0.99]}}, full]
budgets: [10%, 20%, 40%]
"""
TEXT = """\
# Experiments

Written by `python tools/docs.py`.

An experiment compares policies, cache sizes, tasks and models, and tests whether the differences are real. It is one
YAML file, or a TOML file if its name ends in `.toml`:

```yaml
# experiment.yaml
{example}```

<!-- not run: it takes several minutes -->
```sh
kvscope run experiment.yaml --dry-run
kvscope run experiment.yaml
```

`--dry-run` prints the number of traces and runs, which of them are done, the disk space that the traces need, and an
estimate of the remaining time. For the estimate, it traces and replays a few short examples of each model.

Each combination of model, task, length and seed gives one trace in `traces/cells`. Each policy and budget gives one
run over each trace; runs that share their passes form one replay in `reports/cells`. A trace or replay is called a
*cell*. The name of its folder ends in a checksum of everything that it depends on: the content of prompts, of a local
model and of your own policies, all options, and the version of kvscope. Therefore:

- kvscope never computes a cell twice, neither in this experiment nor in another. To continue an interrupted
  experiment, run the same command again.
- After you change a line, kvscope recomputes only what depends on it: a new budget is replayed over the existing
  traces.
- If you add a step, such as `generate`, kvscope computes it for the runs that lack it.

For weights above 10 MB, the checksum covers size and date instead of the content. A trace has the same name whether
it was recorded on a CPU or on a GPU.

The results are `reports/NAME.json` and the page `reports/NAME.html`, where NAME is the name of the file, or the value
of `-o`. Both name the best policy at each budget by answers, by perplexity and by retained mass, and say where these
disagree. A sign test and a 95 % interval of the difference show whether the best policy differs from the next, on the
sequences that both have; near-copies within a trace count as one sequence. Bounds and policies that hold every key
are not ranked. Policies can hold different numbers of keys at one budget: `snapkv`, for example, retains all tokens
after the prompt. So compare them by `held`.

Means over several tasks give every sequence the same weight. Perplexity is computed over all tokens together.

`cache: [16bit, int4:kivi]` runs every policy under every budget, once with a cache in 16 bit and once in 4 bit.
`merge: [none, cam]` runs it without and with merging of evicted keys. The rows are then called `h2o + int4:kivi` or
`h2o + cam`. See [quantised caches](quantised_caches.md) and [merging](merging.md). Merging runs only in the closed
loop, and so do quantised caches over traces that have only maps: their metrics come from the attention inside the
model. With `cache`, every row has the metric `cache_bytes`: a quantised cache holds more keys in the same bytes.

If a cell fails, the command names it and the reason at the end, and exits with status 1; all other cells have
results. A full disk ends the experiment; finished cells remain. `all` in `policies` selects every policy that can run
on the traces.

The replay of a cell is a normal replay: `kvscope report cells/FOLDER` draws it, and `kvscope compare` compares two of
its policies.

`--on ray` computes many cells at the same time, on several GPUs or machines: see [clusters](clusters.md).

## Keys of the file

Paths are relative to the folder in which the command runs. A single value counts as a list with one element.

{keys}

A model is a name, or a table with these keys:

{model}

## `reports/NAME.json`

The file contains its own checksum. Version {version}: {history}.

{summary}

Each replay in `reports/cells` has a file of the same name with `.json` beside it. Experiments are pooled from these
files:

{cell}
"""
SUMMARY = (records.ExperimentRecord, records.PooledRun, records.Verdict, records.Failure)
CELL = (records.CellRecord, records.CellSequence, records.CellRun)


def describe() -> str:
    """Return the documentation of experiments as Markdown."""
    return TEXT.format(
        example=EXAMPLE,
        keys=_keys(Experiment),
        model=_keys(ModelEntry),
        version=records.SCHEMA_VERSION,
        history=records.HISTORY[records.SCHEMA_VERSION],
        summary="\n\n".join(map(_record, SUMMARY)),
        cell="\n\n".join(map(_record, CELL)),
    )


def _keys(of: type) -> str:
    """Return the table of the keys of a file, with their defaults."""
    defaults = {each.name: each.default for each in fields(of)}
    rows = [
        f"| `{name}` | {kind} | {_default(defaults[name])} | {text} |"
        for name, kind, text in described(of)
        if name != "name"
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _default(value: object) -> str:
    if value is MISSING:
        return "needed"
    if value is None or value == () or value is False:
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _record(of: type) -> str:
    return "\n".join([f"`{of.__name__}`", "", "| field | type | meaning |", "|---|---|---|", *_rows(of)])


def _rows(of: type) -> Iterator[str]:
    for name, kind, text in described(of):
        yield f"| `{name}` | {kind} | {text} |"
