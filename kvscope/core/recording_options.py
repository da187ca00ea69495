"""What a recording may choose: which tokens, what of them is stored, and how many are computed at a time.

The command line and the Python functions take the same records. No torch here, as in `kvscope.core.options`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import UsageError
from kvscope.core.json import Json


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


@dataclass(frozen=True)
class ImageOptions:
    """Images that are named beside a prompt, and how addresses are read.

    Attributes
    ----------
    names : tuple of str
        Paths and addresses, in the order of their places in the prompt.
    read_address : callable or None
        Returns at most so many bytes of what an address names; None refuses images at addresses.
    """

    names: tuple[str, ...] = ()
    read_address: Callable[[str, int], bytes] | None = None


@dataclass(frozen=True)
class TextOptions:
    """What the model reads and writes after each prompt.

    Attributes
    ----------
    continuation : Path or None
        Text that is forced after every prompt instead of generating (teacher forcing).
    chat : bool
        Whether to wrap each prompt in the model's chat template.
    max_new_tokens : int
        Tokens after the prompt, at most.
    seed : int
        Seed of the first sequence's sampling; every further sequence adds one.
    field : str or None
        Field of the prompt in the objects of JSON files; None is the first of the usual names.
    system : str or None
        System message before the prompt; only with a chat template.
    chat_options : mapping
        Options of the chat template, as ``{"enable_thinking": False}``.
    answers : tuple of str
        Right answers of a single prompt that has none of its own.
    images : ImageOptions
        Images of a single prompt that has none of its own, and how those at addresses are read.
    template : str or None
        Text of every prompt, in which ``{name}`` is a field of the objects of JSON files.

    Raises
    ------
    UsageError
        For a negative number of tokens.
    """

    continuation: Path | None = None
    chat: bool = False
    max_new_tokens: int = 128
    seed: int = 0
    field: str | None = None
    system: str | None = None
    chat_options: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    answers: tuple[str, ...] = ()
    images: ImageOptions = ImageOptions()
    template: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UsageError(f"max_new_tokens={self.max_new_tokens} is negative", "Use 0 or more.")


@dataclass(frozen=True)
class StoreOptions:
    """What of the model's attention is stored.

    Attributes
    ----------
    store : str
        ``maps``: rows of attention; ``maps+vectors``: also the queries, keys and values of every token, exactly;
        ``qkv``: only these, whose size grows linearly with the length, and from which rows are recomputed when the
        trace is read; ``topk:K``: the `K` heaviest keys of every row and sums of columns, from which rows are rebuilt
        approximately; ``auto``: ``maps+vectors`` if the trace is small, otherwise ``maps``.
    layers : tuple of int, or None
        Layers to record; None is all.
    heads : tuple of int, or None
        Query heads to record, in whole groups that share keys and values; None is all.
    query_stride : int
        Record every n-th row of attention. Such a trace can be read, but not replayed.
    hidden : bool or None
        Whether to record layer inputs too, from which gates decide; None: if the model's folder contains a gate.
    outputs : bool
        Whether to record the norms of values after the output projection.
    reread : bool
        Whether to read every prompt a second time, and record how much each of its keys is attended to.

    Raises
    ------
    UsageError
        For a stride below 1.
    """

    store: str = "maps"
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    query_stride: int = 1
    hidden: bool | None = None
    outputs: bool = False
    reread: bool = False

    def __post_init__(self) -> None:
        if self.query_stride < 1:
            raise UsageError(f"query_stride={self.query_stride} is below 1", "Use 1 or more.")


@dataclass(frozen=True)
class BlockOptions:
    """How many tokens are computed at a time, which bounds memory and changes no result.

    Attributes
    ----------
    query_block : int
        Queries whose rows exist at a time.
    prefill_chunk : int or None
        Tokens of a prompt that go through the model at a time; None is as many as bound the memory for logits.

    Raises
    ------
    UsageError
        For a size below 1.
    """

    query_block: int = 128
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.query_block < 1:
            raise UsageError(f"query_block={self.query_block} is below 1", "Use 1 or more.")
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise UsageError(f"prefill_chunk={self.prefill_chunk} is below 1", "Use 1 or more.")
