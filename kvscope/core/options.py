"""What a user may choose: every set of choices once, every group of settings once.

The command line and the Python functions take the same records, so that a setting has one name, one default and one
check. No torch here: the records are read before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from kvscope.core.errors import UsageError


class Prefill(StrEnum):
    """What happens during the prompt: one choice at its end, or eviction as soon as the cache exceeds the budget."""

    full = "full"
    stream = "stream"


class Positions(StrEnum):
    """RoPE positions of the keys of a shortened cache: as in the text, or renumbered within the cache."""

    original = "original"
    compacted = "compacted"


class Loop(StrEnum):
    """Whether a policy sees recorded attention (open), or runs inside the model's attention (closed)."""

    open = "open"
    closed = "closed"


class ExportFormat(StrEnum):
    """File format of exported tables."""

    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"


class ExportLevel(StrEnum):
    """What a row of an exported fidelity table is: a step of a head, or a mean over steps, then heads, and so on."""

    step = "step"
    head = "head"
    layer = "layer"
    sequence = "sequence"
    run = "run"


class DiffFormat(StrEnum):
    """How the comparison of two replays is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"
    junit = "junit"


class TuneLevel(StrEnum):
    """What gets a setting of its own; a head is a key/value head."""

    model = "model"
    layer = "layer"
    head = "head"


C = TypeVar("C", bound=StrEnum)


def choice(kind: type[C], value: str, option: str) -> C:
    """Return the member of an enum that `value` names.

    Parameters
    ----------
    kind : type
        One of the enums of this module.
    value : str
        A member, or its name.
    option : str
        Name of the argument, for the message: ``prefill``.

    Raises
    ------
    UsageError
        If there is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{option} {value!r} is unknown", f"Use one of: {', '.join(kind)}.") from None


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded.

    Attributes
    ----------
    model : str, or tuple of a model and its tokenizer
        ``demo``, an alias (``llama2-7b``), a Hub id, a local folder, or a loaded pair ``(model, tokenizer)``.
    revision : str or None
        Branch, tag or commit of a Hub model.
    dtype : str
        ``auto``, ``float32``, ``float64``, ``float16``, ``bfloat16``.
    device : str
        ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    device_map : str or None
        How accelerate places the parts of the model.
    trust_remote_code : bool
        Whether code that comes with the model may run.
    """

    model: str | tuple[Any, Any]
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meaning as in transformers' ``generate``.

    Raises
    ------
    UsageError
        For a value out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"temperature={self.temperature} is not above 0", "For greedy decoding omit --do-sample.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is out of range", "top_p is above 0 and at most 1.")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} is negative", "top_k is 0 (all tokens) or above.")
