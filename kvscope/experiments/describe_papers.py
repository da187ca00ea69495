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

`kvscope reproduce` runs the experiments of five papers and reports for each claim whether its order holds:

<!-- not run: a paper takes minutes, and other models are downloaded -->
```sh
kvscope reproduce
kvscope reproduce tova
kvscope reproduce tova --dry-run
kvscope reproduce tova --model llama2-7b --prompts pg19.jsonl
kvscope reproduce attention-gate --model llama2-7b --prompts piqa.jsonl --gate gate.safetensors
```

Without `--model`, it runs the bundled model, which needs no network and takes one to three minutes for a paper on two
cores. Model, texts and tasks then differ from those of the paper; each table says how. With any other model, budgets,
lengths and parameters are those of the paper, as far as we know them. `--prompts` then gives the texts that do not
come with kvscope: files that `kvscope trace` reads, with `answers` if answers are scored. We have not run these
settings on the papers' models; the tables below are for the bundled model.

These are normal [experiments](experiments.md): they share traces and replays with `kvscope run`, and nothing is
computed twice. The page of an experiment is `reports/reproduce-NAME-PART.html`. The result for each claim is in
`reports/reproduce-NAME.json`; `--markdown` prints the tables of this page.

{papers}

kvscope tests a claim in this way:

- A claim says that one setting, a policy under a budget, is better than another by a metric. The columns *paper* and
  *here* have the value of the setting that the paper calls better, then that of the other one. Values *here* are means
  over sequences. A dash in *paper* means that the values were not available to us; then we compare only the order.
- kvscope compares both settings on the same sequences. The order is certain if the sign test over sequences has
  p <= 0.05 and the 95 % interval of the mean difference, in brackets, excludes 0; near-copies count as one sequence. A
  certain order *agrees* with the paper or *differs* from it; otherwise it is *not certain*.
- *at equal held keys* or *read keys*: in each sequence, the value of the other policy is interpolated between the
  budgets at which it has as many keys in the open loop. Sequences that lie outside its budgets are omitted and counted.
- If we use another metric than the paper, the metric of the paper is given in brackets.
- Under each table are the reasons why the bundled model gives another order or no certain one, as far as we measured
  them: `python benchmarks/reproduce_reasons.py`.

{found}

## `reports/reproduce-NAME.json`

The file contains its own checksum. Version {version}: {history}.

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
