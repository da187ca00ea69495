"""Run a model over prompts while a recorder observes its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.model_types import KeyValueCache, ModelOutput
from kvscope.model.attention_hook import observe_attention
from kvscope.model.copies import HostCopies
from kvscope.model.header import sequence_record
from kvscope.model.image_check import forget_positions, images_explained, require_causal
from kvscope.model.loading import Loaded
from kvscope.model.module_maps import MapRecorder, observe_modules, sources
from kvscope.model.prompts import Prompt, token_texts
from kvscope.model.recorder import Recorder
from kvscope.model.sampling import Chooser
from kvscope.model.selfcheck import PROBE
from kvscope.model.short_cache import full_cache
from kvscope.trace.record import SequenceRecord
from kvscope.trace.writer import TraceWriter

LOGIT_BLOCK = 256  # positions whose logits are normalised at a time
Numbers = NDArray[np.floating]
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
Score = tuple[Tensor, Tensor]  # log-probabilities and entropies of some tokens on the device, nats


@dataclass(frozen=True)
class Progress:
    """Progress of a recording: tokens processed, upper bound on all tokens, bytes written."""

    done: int
    total: int
    bytes: int


class RecordingRun:
    """Runs the model of a recording over one sequence after the other.

    Parameters
    ----------
    loaded : Loaded
        The model.
    writer : TraceWriter
        Writes the tokens.
    recorder : Recorder or MapRecorder
        Writes the attention calls, or the rows that modules return.
    prefill_chunk : int or None
        Tokens of a prompt per forward pass; None for all.
    total : int
        Upper bound on the tokens of all sequences.
    progress_callback : callable, optional
        Called with `Progress` after every forward pass.
    reread : callable, optional
        Called with the number, prompt and length of each sequence after it, to let the model read the prompt again.
    """

    def __init__(
        self,
        loaded: Loaded,
        writer: TraceWriter,
        recorder: Recorder | MapRecorder,
        prefill_chunk: int | None,
        total: int,
        progress_callback: Callable[[Progress], None] | None = None,
        reread: Callable[[int, Sequence[int], int], None] | None = None,
    ) -> None:
        self.loaded, self.writer, self.recorder, self.chunk = loaded, writer, recorder, prefill_chunk
        self.total, self.done, self.progress_callback = total, 0, progress_callback
        self.stops, self._reread = stop_ids(loaded), reread
        self._copies = HostCopies()

    def record(self, number: int, prompt: Prompt, max_new_tokens: int, choose: Chooser) -> SequenceRecord:
        """Record one sequence and return its entry for ``trace.json``."""
        self.recorder.begin(number, len(prompt.ids))
        forget_positions(self.loaded.model)
        with self._observed(prompt):
            if prompt.forced is not None:
                ids, scores = self._forced(prompt)
            else:
                ids, scores = self._generated(prompt, max_new_tokens, choose)
        forget_positions(self.loaded.model)
        self.recorder.end()
        if self._reread is not None:
            self._reread(number, prompt.ids, len(ids))
        logprob, entropy = self._on_host(scores)
        self.writer.tokens(
            number,
            token_id=ids,
            text=token_texts(self.loaded.tokenizer, ids),
            is_prompt=[position < len(prompt.ids) for position in range(len(ids))],
            logprob=logprob,
            entropy=entropy,
        )
        self._report(0)
        return sequence_record(prompt, len(ids))

    def _observed(self, prompt: Prompt) -> AbstractContextManager[None]:
        """Return the context in which the recorder gets what the model attends to."""
        if isinstance(self.recorder, MapRecorder):
            found = sources(self.loaded.model, torch.tensor([prompt.ids[:PROBE]], device=self.loaded.device))
            return observe_modules(found, self.recorder)
        recorder = self.recorder if prompt.inputs is None else require_causal(self.loaded, prompt, self.recorder)
        return observe_attention(self.loaded.model, recorder, inputs=self.recorder.reads_inputs)

    def _forced(self, prompt: Prompt) -> tuple[list[int], list[Score]]:
        ids = prompt.ids + (prompt.forced or [])
        cache = None if self.chunk is None else full_cache(self.loaded.model)
        return ids, self._read_prompt(prompt, ids, cache)[0]

    def _generated(self, prompt: Prompt, new: int, choose: Chooser) -> tuple[list[int], list[Score]]:
        """Decode token by token; the last token is also run through the model, so that every token has its rows.

        Tokens and scores stay on the device. Only a model with stop tokens has each token read, after the next forward
        pass was started, so that the device always has work.
        """
        cache = full_cache(self.loaded.model)
        scores, last = self._read_prompt(prompt, prompt.ids, cache)
        tokens: list[Tensor] = []
        for _ in range(new):
            token = choose(last).to(self.loaded.device)
            copy = self._copies.start({"token": token}) if self.stops else None
            scores += _scores(last, token[0])
            tokens.append(token)
            last = self._forward(token, cache).logits[0, -1:]
            self._report(1)
            if copy is not None and int(copy.wait()["token"][0, 0]) in self.stops:
                break
        made = self._copies.start({"tokens": torch.cat(tokens, 1)}).wait()["tokens"][0].tolist() if tokens else []
        return prompt.ids + made, scores

    def _read_prompt(self, prompt: Prompt, ids: list[int], cache: KeyValueCache | None) -> tuple[list[Score], Tensor]:
        """Run the model over a prompt, and what is forced after it, with its images; return as `_read`."""
        beside = NOTHING if prompt.inputs is None else prompt.inputs.for_tokens(len(ids))
        with images_explained(self.loaded, prompt):
            return self._read(ids, cache, beside)

    def _read(
        self, ids: list[int], cache: KeyValueCache | None, beside: Mapping[str, Tensor]
    ) -> tuple[list[Score], Tensor]:
        """Run the model over tokens, chunk by chunk; return scores and the last logits ``[1, vocabulary]``.

        `beside` is what it reads of images, with all tokens in one chunk.
        """
        tokens = torch.tensor([ids], device=self.loaded.device)
        scores: list[Score] = []
        size = self.chunk or len(ids)
        for start in range(0, len(ids), size):
            logits = self._forward(tokens[:, start : start + size], cache, beside).logits[0]
            following = tokens[0, start + 1 : start + size + 1]
            scores += _scores(logits[: len(following)], following)
            last = logits[-1:].clone()
            self._report(len(logits))
            del logits  # free the memory before the next chunk allocates as much
        return scores, last

    def _forward(
        self, tokens: Tensor, cache: KeyValueCache | None, beside: Mapping[str, Tensor] = NOTHING
    ) -> ModelOutput:
        returned = {"output_attentions": True} if isinstance(self.recorder, MapRecorder) else {}
        cached = {"past_key_values": cache, "use_cache": cache is not None}
        return self.loaded.model(input_ids=tokens, **cached, **beside, **returned)

    def _on_host(self, scores: list[Score]) -> tuple[Numbers, Numbers]:
        """Return log-probabilities and entropies on the host, NaN for the first token, which has no prediction."""
        unknown = np.full(1, np.nan, np.float32)
        if not scores:
            return unknown, unknown
        logprobs, entropies = (torch.cat(part) for part in zip(*scores, strict=True))
        host = self._copies.start({"logprob": logprobs, "entropy": entropies}).wait()
        return np.append(unknown, host["logprob"]), np.append(unknown, host["entropy"])

    def _report(self, tokens: int) -> None:
        self.done += tokens
        if self.progress_callback is not None:
            self.progress_callback(Progress(self.done, self.total, self.writer.bytes_written))


def _scores(logits: Tensor, ids: Tensor) -> list[Score]:
    """Return the log-probabilities of tokens and the entropies of their distributions, nats, in blocks."""
    parts: list[Score] = []
    for start in range(0, len(ids), LOGIT_BLOCK):
        logprobs = torch.log_softmax(logits[start : start + LOGIT_BLOCK].float(), -1)
        selected = logprobs.gather(-1, ids[start : start + LOGIT_BLOCK, None])[:, 0]
        entropy = -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(-1)
        parts.append((selected, entropy))
    return parts


def stop_ids(loaded: Loaded) -> frozenset[int]:
    """Return the tokens that end a text, as the model's generation settings name them."""
    return stop_ids_of(loaded.model.generation_config.eos_token_id)


def stop_ids_of(ids: int | list[int] | None) -> frozenset[int]:
    """Return the tokens of a setting ``eos_token_id``."""
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
