"""Document the papers that can be reproduced: what is run, how claims are tested, and what the bundled model gives."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core import claim_records as records
from kvscope.core.claim_records import Reproduction
from kvscope.core.json_records import described
from kvscope.experiments.paper import Paper, paper_names, read_paper
from kvscope.results.claims_table import markdown
from kvscope.results.render import escape_markdown

TEXT = """\
# Papers

Written by `python tools/docs.py`.

`kvscope reproduce` runs the experiments of five papers and says of each claim whether its order holds:

<!-- not run: a paper takes minutes, and other models are downloaded -->
```sh
kvscope reproduce
kvscope reproduce tova
kvscope reproduce tova --dry-run
kvscope reproduce tova --model llama2-7b --prompts pg19.jsonl
kvscope reproduce attention-gate --model llama2-7b --prompts piqa.jsonl --gate gate.safetensors
```

Without `--model` it is the bundled model, which needs no network and takes one to three minutes for a paper on two
cores. Its model is not the paper's, its texts are shorter and its tasks are others; each table says how. With any
other model, budgets, lengths and parameters are the paper's as far as they are known, and `--prompts` gives the texts
that do not come with kvscope: files as `kvscope trace` reads them, with `answers` where answers are scored. These
settings have not been run on the papers' models: the tables below are of the bundled model.

Each experiment of a paper is an experiment like any other: its traces and replays are shared with `kvscope run`, what
is done is not done again, and its page is `reports/reproduce-NAME-PART.html`. What became of the claims is
`reports/reproduce-NAME.json`; `--markdown` prints the tables of this page.

{papers}

How a claim is tested:

- It says that one setting, a policy under a budget, is better than another by a metric. *paper* and *here* have the
  values of the setting that the paper calls better, then of the other one. Values here are means over sequences. A dash
  in the place of the paper's values means that they were not available to us; then only the order is compared.
- Both are compared on the same sequences. The order is certain if the sign test over sequences has p <= 0.05 and the
  95 % interval of the mean difference, in brackets, excludes 0; near-copies count as one. It then *agrees* with the
  paper or *differs*; else it is *not certain*.
- *at equal held keys*, or read keys: in each sequence, the other policy is interpolated between the budgets at which it
  has as many keys in the open loop. A sequence in which no budget has as many, or as few, is omitted, and counted.
- Where the metric is not the paper's, the paper's is named beside it.
- Under each table are the reasons, as far as they were measured, why the bundled model gives another order or none:
  `python benchmarks/reproduce_reasons.py` measures them.

{found}

# `reports/reproduce-NAME.json`

Its checksum is part of it. Version {version}: {history}.

{fields}
"""
FIELDS = (records.Reproduction, records.Finding, records.Claim, records.Setting, records.SettingValue)


def describe(found: Sequence[Reproduction]) -> str:
    """Return the documentation of the papers as Markdown.

    Parameters
    ----------
    found : sequence of Reproduction
        What the bundled model gave.
    """
    return TEXT.format(
        papers=_list([read_paper(name) for name in paper_names()]),
        found="\n".join(markdown(one, bundled=True) for one in found).rstrip(),
        version=records.SCHEMA_VERSION,
        history=records.HISTORY[records.SCHEMA_VERSION],
        fields="\n\n".join(map(_fields, FIELDS)),
    )


def _list(papers: Sequence[Paper]) -> str:
    rows = ["| paper | source | what it claims | its model | `--prompts` for its model |", "|---|---|---|---|---|"]
    for one in papers:
        texts = "; ".join(part.texts for part in one.parts.values() if part.texts is not None)
        rows.append(f"| `{one.name}` | {one.source} | {escape_markdown(one.about)} | `{one.model}` | {texts} |")
    return "\n".join(rows)


def _fields(of: type) -> str:
    rows = [f"| `{name}` | {kind} | {text} |" for name, kind, text in described(of)]
    return "\n".join([f"`{of.__name__}`", "", "| field | type | meaning |", "|---|---|---|", *rows])
