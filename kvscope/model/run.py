"""Running a model over prompts while a recorder watches: forced texts are read, others are continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from kvscope.core.model_types import ModelOutput
from kvscope.model.attention_hook import watching
from kvscope.model.loading import Loaded
from kvscope.model.prompts import Prompt, token_texts
from kvscope.model.recorder import Recorder
from kvscope.model.sampling import Chooser
from kvscope.trace.record import SequenceRecord
from kvscope.trace.writer import TraceWriter

LOGIT_BLOCK = 256  # positions whose logits are normalised at a time
Score = tuple[NDArray[np.floating], NDArray[np.floating]]  # log-probability and entropy of some tokens


@dataclass(frozen=True)
class Progress:
    """How far a recording is: tokens done, tokens in all (at most), bytes written."""

    done: int
    total: int
    bytes: int


class RecordingRun:
    """The model side of one recording: sequences go through the model one after the other.

    Parameters
    ----------
    loaded, writer, recorder
        The model, and what tokens and attention calls are written with.
    prefill_chunk : int or None
        Tokens of a prompt that go through the model at a time; None is all.
    total : int
        Tokens of all sequences, at most.
    progress_callback : callable, optional
        Called with `Progress` after every forward pass.
    """

    def __init__(
        self,
        loaded: Loaded,
        writer: TraceWriter,
        recorder: Recorder,
        prefill_chunk: int | None,
        total: int,
        progress_callback: Callable[[Progress], None] | None = None,
    ) -> None:
        self.loaded, self.writer, self.recorder, self.chunk = loaded, writer, recorder, prefill_chunk
        self.total, self.done, self.progress_callback = total, 0, progress_callback
        self.stops = _stop_ids(loaded)

    def record(self, number: int, prompt: Prompt, max_new_tokens: int, choose: Chooser) -> SequenceRecord:
        """Record one sequence, and return its entry for the header."""
        self.recorder.begin(number, len(prompt.ids))
        with watching(self.loaded.model, self.recorder):
            if prompt.forced is not None:
                ids, scores = self._forced(prompt.ids + prompt.forced)
            else:
                ids, scores = self._generated(prompt.ids, max_new_tokens, choose)
        self.recorder.end()
        first: Score = (np.full(1, np.nan), np.full(1, np.nan))  # nothing predicts the first token
        logprob, entropy = (np.concatenate(part) for part in zip(first, *scores, strict=True))
        self.writer.tokens(
            number,
            token_id=ids,
            text=token_texts(self.loaded.tokenizer, ids),
            is_prompt=[position < len(prompt.ids) for position in range(len(ids))],
            logprob=logprob,
            entropy=entropy,
        )
        self._report(0)
        return SequenceRecord(len(prompt.ids), len(ids), prompt.forced is not None)

    def _forced(self, ids: list[int]) -> tuple[list[int], list[Score]]:
        cache = None if self.chunk is None else DynamicCache(config=self.loaded.model.config)
        return ids, self._read(ids, cache)[0]

    def _generated(self, prompt: list[int], new: int, choose: Chooser) -> tuple[list[int], list[Score]]:
        """Decode token by token; the last token goes through the model too, so that every token has its rows."""
        cache = DynamicCache(config=self.loaded.model.config)
        scores, last = self._read(prompt, cache)
        ids = list(prompt)
        for _ in range(new):
            token = choose(torch.tensor([ids], device=self.loaded.device), last)
            step = torch.tensor([[token]], device=self.loaded.device)
            scores += _scores(last, step[0])
            ids.append(token)
            last = self._forward(step, cache).logits[0, -1:]
            self._report(1)
            if token in self.stops:
                break
        return ids, scores

    def _read(self, ids: list[int], cache: DynamicCache | None) -> tuple[list[Score], Tensor]:
        """Send tokens through the model, chunk by chunk; return scores and the last logits ``[1, vocabulary]``."""
        tokens = torch.tensor([ids], device=self.loaded.device)
        scores: list[Score] = []
        size = self.chunk or len(ids)
        for start in range(0, len(ids), size):
            logits = self._forward(tokens[:, start : start + size], cache).logits[0]
            following = tokens[0, start + 1 : start + size + 1]
            scores += _scores(logits[: len(following)], following)
            last = logits[-1:].clone()
            self._report(len(logits))
            del logits  # before the next chunk makes its own
        return scores, last

    def _forward(self, tokens: Tensor, cache: DynamicCache | None) -> ModelOutput:
        return self.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)

    def _report(self, tokens: int) -> None:
        self.done += tokens
        if self.progress_callback is not None:
            self.progress_callback(Progress(self.done, self.total, self.writer.bytes_written))


def _scores(logits: Tensor, ids: Tensor) -> list[Score]:
    """Return log-probabilities of the tokens and entropies of their distributions, nats, block by block."""
    parts: list[Score] = []
    for start in range(0, len(ids), LOGIT_BLOCK):
        share = torch.log_softmax(logits[start : start + LOGIT_BLOCK].float(), -1)
        chosen = share.gather(-1, ids[start : start + LOGIT_BLOCK, None])[:, 0]
        entropy = -torch.where(share.isneginf(), 0.0, share.exp() * share).sum(-1)
        parts.append((chosen.cpu().numpy(), entropy.cpu().numpy()))
    return parts


def _stop_ids(loaded: Loaded) -> frozenset[int]:
    ids = loaded.model.generation_config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
