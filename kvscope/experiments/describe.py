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

An experiment answers: which policy, at which cache size, on which tasks, with which model, and is the difference
real? It is one file in YAML, or in TOML if its name ends in `.toml`:

```yaml
# experiment.yaml
{example}```

<!-- not run: it takes several minutes -->
```sh
kvscope run experiment.yaml --dry-run
kvscope run experiment.yaml
```

`--dry-run` prints how many traces and runs there are, which of them are done, how much space the traces take, and
about how long the rest takes: it traces and replays a few short examples of each model to find out.

Every combination of model, task, length and seed is one trace in `traces/cells`. Every policy and budget is one run
over each trace; runs that are made together are one replay in `reports/cells`. The name of a folder ends in a
checksum of all that it depends on: the content of prompts, of a local model and of your own policies, every option,
the version of kvscope. So:

- What is done is not done again, in this experiment or another one. An interrupted experiment goes on where it was
  when the same command is given again.
- A changed line redoes only what depends on it: a new budget is replayed over the traces that are there.
- A step that is added, as `generate`, is done for the runs that lack it.

Of weights above 10 MB, size and date count in place of the content. Whether a trace was recorded on a CPU or a GPU
makes no difference to its name.

The results are `reports/NAME.json` and the page `reports/NAME.html`, where NAME is that of the file or of `-o`. Both
name the best policy at each budget by answers, by perplexity and by retained mass, and say where these disagree.
Whether the best differs from the next is tested on the sequences of both: a sign test and a 95 % interval of the
difference, in which near-copies within a trace count as one. Bounds and policies that hold every key are not ranked.
Policies may hold different numbers of keys at one budget, as `snapkv`, which retains all tokens after the prompt:
compare by `held`.

Means over several tasks give every sequence the same weight. Perplexity is that of all tokens together.

`cache: [16bit, int4:kivi]` runs every policy under every budget with a cache in 16 bit and in 4 bit, and
`merge: [none, cam]` with and without merging of what is evicted: rows are then called `h2o + int4:kivi` or
`h2o + cam`. See [quantised caches](quantised_caches.md) and [merging](merging.md). Merging, and quantised caches over
traces of maps alone, run in the closed loop only: their figures are of the attention in the model. A figure
`cache_bytes` is then there for every cache: a quantised one holds more keys in the same bytes.

What fails is named at the end with its reason, and the status is 1; everything else has a result. `all` among the
policies is every policy that can run on the traces. A full disk ends the experiment; finished cells stay.

Each replay of a cell is a replay like any other: `kvscope report cells/FOLDER` draws it, `kvscope compare` compares
two of its policies.

`--on ray` makes many cells at the same time, on several GPUs or machines: see [clusters.md](clusters.md).

## Keys of the file

Paths are relative to the folder in which the command runs. A value stands for a list of one.

{keys}

A model is a name, or a table with these keys:

{model}

## `reports/NAME.json`

Its checksum is part of it. Version {version}: {history}.

{summary}

Beside every replay in `reports/cells` is a file of the same name with `.json`, from which experiments are pooled:

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
