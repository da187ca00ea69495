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

Written by `python tools/docs.py` from the results of `python tools/models.py --write`.

The table lists all causal and image-text types of transformers, {all} in total. We tried each with a tiny random model:
traced it on text, compared the rows with eager attention, replayed the trace in both loops, and ran `verify`. Three
types have an image encoder from the package timm. The table used an empty encoder for them; with the real encoder the
results are the same. transformers 5.23 cannot build the two `gemma4` assistants; kvscope refuses them by their
configuration. A multimodal type with `rows` in the table also reads images, if it has a processor and attends to images
in order. We tried Llava, Qwen2.5-VL, Qwen3-VL and Idefics3 on images.

- *trace*: for `rows` ({rows} types), kvscope recomputes rows from queries and keys, and has all signals. For
  `module rows` ({modules}), it records the rows that the model's attention modules return, without norms and vectors.
  It refuses {refused} types for the reason in the remark (`refused`).
- *open loop*, *closed loop*: whether policies can be replayed over the trace, and run inside the model.
- *verify*: whether decoding with a smaller cache gives the same as the closed loop in float64.
- *remark*: why something does not work, and what is special. Layers that share a cache share one decision, which counts
  once; we tried this with Gemma 3n, Gemma 4 and Mistral Large 4. If heads share one latent cache, the default is one
  decision for the layer.

`kvscope models NAME` describes one type, or one model.

| type | trace | open loop | closed loop | verify | remark |
|---|---|---|---|---|---|""".splitlines()


def _row(one: TypeRecord) -> str:
    remark = one.remark.replace("|", "/") or "-"
    return f"| `{one.name}` | {one.trace} | {one.replay} | {one.closed} | {one.verify} | {remark} |"
