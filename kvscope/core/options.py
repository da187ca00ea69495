"""What a user may choose: every set of choices once, every group of settings once.

The command line and the Python functions take the same records, so that a setting has one name, one default and one
check. No torch here: the records are read before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from kvscope.core.errors import UsageError
from kvscope.core.model_types import CausalModel, Tokenizer


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
    markdown = "markdown"
    latex = "latex"


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
    quantize : str or None
        ``4bit`` or ``8bit``: quantise the weights at loading, with bitsandbytes on a CUDA device.
    """

    model: str | tuple[CausalModel, Tokenizer]
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | None = None
    trust_remote_code: bool = False
    quantize: str | None = None


@dataclass(frozen=True)
class PlanOptions:
    """Choices that hold for every policy of a command; what is None stays as each policy was published.

    Attributes
    ----------
    params : mapping of str to str
        Parameters for every policy that has them.
    compress : str or None
        When to evict: ``prefill``, ``step`` or ``every:N``.
    allocate : str or None
        How the budget is allocated to layers and heads: ``uniform``, ``pyramid``, ``ada``, ``cake``.
    accumulate : str or None
        Precision of live rows and sums: ``float32``, ``float16``, ``bfloat16``.
    scope : str or None
        Whether each ``kv_head`` decides, or the heads of a ``layer`` as one; None: as each policy was published, and in
        a model with a latent cache the layer, where the policy can.
    caches : str or sequence of str
        How caches are quantised, each as ``int4:kivi``, or ``16bit``; every policy runs with each. Empty: ``16bit``.
    merges : str or sequence of str
        How evicted keys are merged into those that stay, each as ``d2o``, or ``none``; closed loop only. Empty: none.
    """

    params: Mapping[str, str] = field(default_factory=dict)
    compress: str | None = None
    allocate: str | None = None
    accumulate: str | None = None
    scope: str | None = None
    caches: str | Sequence[str] = ()
    merges: str | Sequence[str] = ()


@dataclass(frozen=True)
class ClosedLoopOptions:
    """How the model of a trace runs again.

    Attributes
    ----------
    positions : Positions
        RoPE positions of the keys of a shortened cache.
    model : str or None
        Name or folder of the model, where it is no longer what the trace calls it.
    dtype : str
        As for a trace: ``auto``, ``float32``, ``float64``, ``float16``, ``bfloat16``.
    device_map : str or None
        How accelerate places the parts of the model.
    """

    positions: Positions = Positions.original
    model: str | None = None
    dtype: str = "auto"
    device_map: str | None = None


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are generated under each policy of a replay's closed loop: greedily, with evicted keys removed.

    Attributes
    ----------
    max_new_tokens : int or None
        Tokens to generate after each prompt at most; None is as many as the trace has after it.
    metric : str or None
        How answers are scored, a name in `kvscope.tasks.SCORES`; None is as the dataset of each example says.
    """

    max_new_tokens: int | None = None
    metric: str | None = None


@dataclass(frozen=True)
class ReplayOptions:
    """What a replay may choose beside policies and budgets.

    Attributes
    ----------
    prefill : Prefill
        What happens during the prompt.
    plan : PlanOptions
        Choices for every policy.
    metrics : tuple of str, or None
        Names; None is every metric that the trace has the signals for.
    closed : ClosedLoopOptions or None
        Runs the model of the trace too, with the policies inside its attention.
    generate : GenerateOptions or None
        Lets the model continue the prompts under each policy too, and scores what it says; needs `closed`.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    skip_unsupported : bool
        Whether a policy that the trace or another choice does not allow is skipped, instead of refused.
    """

    prefill: Prefill = Prefill.full
    plan: PlanOptions = PlanOptions()
    metrics: tuple[str, ...] | None = None
    closed: ClosedLoopOptions | None = None
    generate: GenerateOptions | None = None
    device: str = "cpu"
    skip_unsupported: bool = False


@dataclass(frozen=True)
class PerplexityOptions:
    """What a measurement of perplexity on text files may choose.

    Attributes
    ----------
    plan : PlanOptions
        Choices for every policy.
    positions : Positions
        RoPE positions of the keys of a shortened cache.
    metrics : tuple of str, or None
        Names; None is all.
    window : int or None
        Tokens of a window; None is the model's context, at most 1,024.
    max_windows : int or None
        Windows of each file; None is all.
    prompt : int
        Tokens of each window that are read with the full cache first, and are not scored.
    """

    plan: PlanOptions = PlanOptions()
    positions: Positions = Positions.original
    metrics: tuple[str, ...] | None = None
    window: int | None = None
    max_windows: int | None = None
    prompt: int = 1


@dataclass(frozen=True)
class VerifyOptions:
    """What a comparison of the closed loop with real decoding may choose.

    Attributes
    ----------
    prefill : Prefill
        What happens during the prompt.
    plan : PlanOptions
        Choices for every policy.
    closed : ClosedLoopOptions
        Positions and model; its dtype ``auto`` is float64.
    tokens : int or None
        Tokens to decode of each sequence at most; None is all.
    sequences : int
        How many of the trace's sequences, from the first.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    """

    prefill: Prefill = Prefill.full
    plan: PlanOptions = PlanOptions()
    closed: ClosedLoopOptions = ClosedLoopOptions()
    tokens: int | None = None
    sequences: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class TuneOptions:
    """What a search of parameters may choose.

    Attributes
    ----------
    level : TuneLevel
        What gets a setting of its own.
    metric : str
        What to improve.
    prefill : Prefill
        What happens during the prompt.
    held_out : int or None
        How many sequences, the last ones, are kept for the reported gain; None is a quarter, at least one.
    source : str
        Name of the file that will hold the choice, for labels.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    scope : str or None
        What decides, as `PlanOptions.scope`.
    """

    level: TuneLevel = TuneLevel.head
    metric: str = "retained_mass"
    prefill: Prefill = Prefill.full
    held_out: int | None = None
    source: str = "tuned.toml"
    device: str = "cpu"
    scope: str | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Where results go.

    Attributes
    ----------
    path : Path
        Folder to write: ``reports/NAME``.
    force : bool
        Whether to replace an existing one.
    command : str or None
        The command line, for the provenance.
    """

    path: Path
    force: bool = False
    command: str | None = None
