"""``kvscope.record``: record the texts that a model reads and generates in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.model_types import CausalModel, Tokenizer
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.output import require_free
from kvscope.core.recording_options import StoreOptions
from kvscope.model.compile import compile_prompts
from kvscope.model.loading import load
from kvscope.model.prompt_files import PromptText
from kvscope.model.prompts import Prompt
from kvscope.model.run import stop_ids_of
from kvscope.trace.reader import Trace


@dataclass
class HeardText:
    """One text: the tokens that the model read, and how many of them were its prompt."""

    ids: list[int]
    prompt: int


@dataclass
class Recording:
    """What `record` yields.

    Attributes
    ----------
    texts : list of HeardText
        The texts so far, in the order in which they began.
    trace : Trace or None
        The finished trace, once the block has ended.
    """

    texts: list[HeardText] = field(default_factory=list)
    trace: Trace | None = None


@contextmanager
def record(
    model: CausalModel,
    tokenizer: Tokenizer,
    output: Path | str,
    *,
    store: str = "maps",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    hidden: bool | None = None,
    query_stride: int = 1,
    generated: bool = True,
    force: bool = False,
) -> Iterator[Recording]:
    """Record every text that a model reads and generates in a ``with`` block, whatever loop calls it.

    The block may contain ``model.generate(...)``, a pipeline of transformers, or a loop that calls the model. Within
    the block only tokens are collected. At its end the model reads each text once more in one pass, and the trace is
    written from that pass. So the loop keeps its speed, its caches and its batches, and the rows are those of the full
    cache up to rounding, even if the loop evicts from its cache. A batch gives one sequence for each text; tokens that
    ``attention_mask`` hides are padding. If the block raises, nothing is written. The model is restored in any case.

    Parameters
    ----------
    model, tokenizer
        A loaded model in evaluation mode, and its tokenizer.
    output : Path or str
        Folder of the trace.
    store, layers, heads, hidden, query_stride
        See `kvscope.trace`.
    generated : bool
        Whether the model chose the tokens after the prompt; False if the loop gives it a fixed text.
    force : bool
        Whether to replace an existing trace.

    Yields
    ------
    Recording
        Its attribute `trace` is set after the block.

    Raises
    ------
    UsageError
        If the model read no tokens in the block, or got vectors instead of tokens.
    ModelError, TraceError
        As of `kvscope.trace`.

    Example
    -------
    >>> with kvscope.record(model, tokenizer, "traces/mine") as recording:  # doctest: +SKIP
    ...     model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=20)
    """
    loaded, recording, to = load(ModelSource((model, tokenizer))), Recording(), OutputOptions(Path(output), force)
    require_free(to.path, force=force)
    with _heard(model, recording.texts):
        yield recording
    if not recording.texts:
        raise UsageError("the model read no tokens in the block of kvscope.record", "Call the model inside the block.")
    prompts = tuple(_prompt(tokenizer, text, number, generated) for number, text in enumerate(recording.texts))
    options = StoreOptions(store, _numbers(layers), _numbers(heads), query_stride, hidden)
    recording.trace = compile_prompts(loaded, prompts, to, store=options).execute()


def _numbers(selected: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if selected is None else tuple(selected)


def _prompt(tokenizer: Tokenizer, text: HeardText, number: int, generated: bool) -> Prompt:
    ids, after = text.ids[: text.prompt], text.ids[text.prompt :]
    words = tokenizer.decode(ids)
    name = f"loop-{number}-{sha256(words.encode()).hexdigest()[:8]}"
    return Prompt(PromptText(name, f"text {number} of the block", words), words, ids, after, generated=generated)


@contextmanager
def _heard(model: CausalModel, texts: list[HeardText]) -> Iterator[None]:
    """Add the texts of calls of the model to `texts` while the context lasts."""
    heard = _Listener(model, texts)
    had = vars(model).get("generate")
    handle = model.register_forward_pre_hook(heard.forward, with_kwargs=True)
    original = model.generate
    setattr(model, "generate", partial(heard.generate, original))  # noqa: B010  mypy takes it for a method
    try:
        yield
    finally:
        handle.remove()
        delattr(model, "generate")
        if had is not None:
            setattr(model, "generate", had)  # noqa: B010


class _Listener:
    """Collects tokens of calls; inside ``generate`` its result counts, which beams and drafts do not disturb."""

    def __init__(self, model: CausalModel, texts: list[HeardText]) -> None:
        self._model, self._texts, self._current, self._inside = model, texts, list[HeardText](), False

    def forward(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Observe one call of the model."""
        if self._inside:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UsageError("the model was given vectors, which are no tokens to record", "Call it with input_ids.")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        rows = _rows(ids, None if mask is None else mask[:, -ids.shape[1] :])
        if cache is not None and cache.get_seq_length() > 0:
            self._continue(rows)
        elif not self._grows(rows):
            self._current = [HeardText(row, len(row)) for row in rows if row]
            self._texts += self._current

    def _continue(self, rows: list[list[int]]) -> None:
        if len(rows) != len(self._current):
            raise UsageError(
                f"a call continues a cache with {len(rows)} texts, and {len(self._current)} were read before",
                "Begin every text inside the block, with an empty cache.",
            )
        for text, row in zip(self._current, rows, strict=True):
            if len(row) > 1 and text.prompt == len(text.ids):
                text.prompt += len(row)  # a prompt that is read in parts
            text.ids += row

    def _grows(self, rows: list[list[int]]) -> bool:
        """Return whether these are the texts of the last call, each with more tokens: a loop without a cache."""
        olds = self._current
        if len(rows) != len(olds) or not olds:
            return False
        if any(len(row) <= len(old.ids) or row[: len(old.ids)] != old.ids for row, old in zip(rows, olds, strict=True)):
            return False
        for row, old in zip(rows, olds, strict=True):
            old.ids = row
        return True

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``generate`` and take the texts that it returns."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if ids is None:
            raise UsageError("generate was given no tokens to record", "Call it with input_ids.")
        self._inside = True
        try:
            made = original(*args, **kwargs)
        finally:
            self._inside = False
        sequences = made if isinstance(made, Tensor) else made.sequences
        prompts = _rows(ids, kwargs.get("attention_mask"))
        each = len(sequences) // len(prompts)  # several answers to one prompt
        width, stops = ids.shape[1], self._stops(kwargs)
        for number, row in enumerate(sequences.tolist()):
            prompt = prompts[number // each]
            self._texts.append(HeardText(prompt + _whole(row[width:], stops), len(prompt)))
        return made

    def _stops(self, given: dict[str, Any]) -> frozenset[int]:
        """Return the tokens that end a text in a call of ``generate``: its own setting, else that of the model."""
        config = given.get("generation_config") or self._model.generation_config
        return stop_ids_of(given.get("eos_token_id", config.eos_token_id))


def _whole(new: list[int], stops: frozenset[int]) -> list[int]:
    """Return generated tokens up to the first that ends a text: what follows is padding."""
    ends = [place for place, token in enumerate(new) if token in stops]
    return new[: ends[0] + 1] if ends else new


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Return the tokens of each text of a batch, without those that the mask hides."""
    rows = ids.tolist()
    if mask is None:
        return [list(row) for row in rows]
    kept = mask.bool().tolist()
    return [
        [token for token, shown in zip(row, seen, strict=True) if shown] for row, seen in zip(rows, kept, strict=True)
    ]
