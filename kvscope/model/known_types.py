"""What is known of each type of model in transformers.

``types.json`` beside this file holds the results of ``tools/models.py``: every type was built with a tiny random model,
traced, replayed in both loops and verified.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class TypeRecord:
    """What happened to a type.

    Attributes
    ----------
    name : str
        The ``model_type`` of its configuration.
    trace : str
        ``rows`` (recomputed from queries and keys), ``module rows`` (as its modules return them) or ``refused``.
    replay, closed, verify : str
        ``yes``, ``no`` or ``-``, in the open loop, in the closed loop, and beside real decoding.
    remark : str
        Why not, or what is particular.
    """

    name: str
    trace: str
    replay: str
    closed: str
    verify: str
    remark: str = ""


@cache
def known_types() -> dict[str, TypeRecord]:
    """Return what is known of every type, by name."""
    text = (files("kvscope.model") / "types.json").read_text(encoding="utf-8")
    return {name: TypeRecord(name, **record) for name, record in json.loads(text).items()}


def type_of(name: str) -> TypeRecord | None:
    """Return what is known of a type; None if `name` is a model rather than a type."""
    return None if Path(name).is_dir() or "/" in name else known_types().get(name)


def describe() -> str:
    """Return the page of documentation about types, in Markdown."""
    records = list(known_types().values())
    traced = Counter(record.trace for record in records)
    count = {
        "rows": traced["rows"],
        "modules": traced["module rows"],
        "refused": traced["refused"],
    }
    return "\n".join([*(line.format(all=len(records), **count) for line in _PAGE), *map(_row, records), ""])


_PAGE = """# Models

Written by `python tools/docs.py` from the results of `python tools/models.py --write`. Every causal and every
image-text type of transformers, {all} in all, was tried with a tiny random model: traced, compared with eager
attention, replayed in both loops, and verified. All were tried on texts. Three have an image encoder of the package
timm, which is empty in this table; with the encoder the results are the same. transformers 5.23 cannot build the two
`gemma4` assistants, which are refused by their configuration. Multimodal models that the table says give
`rows` also read images, if they have a processor and attend to images in order: Llava, Qwen2.5-VL, Qwen3-VL and
Idefics3 were tried on images.

- trace: `rows` ({rows} types) are recomputed from queries and keys, with all signals; `module rows` ({modules}) are
  what the model's attention modules return, without norms and vectors; {refused} types are `refused`, with the remark
  as reason.
- open and closed loop: whether policies can be replayed over the trace, and inside the model.
- verify: whether real decoding with a shortened cache equals the closed loop in float64.
- remark: why something does not work, and what is particular. Where layers share a cache, one decision holds for all of
  them, and it counts once; sharing was tried with Gemma 3n, Gemma 4 and Mistral Large 4. Where heads share one latent
  cache, the layer decides by default.

`kvscope models NAME` describes one type, or one model.

| type | trace | open loop | closed loop | verify | remark |
|---|---|---|---|---|---|""".splitlines()


def _row(one: TypeRecord) -> str:
    remark = one.remark.replace("|", "/") or "-"
    return f"| `{one.name}` | {one.trace} | {one.replay} | {one.closed} | {one.verify} | {remark} |"
