"""Generate with a real model and record its trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from kvscope.core.errors import UsageError
from kvscope.model.attention_hook import require_registry, watching
from kvscope.model.explain import out_of_memory
from kvscope.model.header import header
from kvscope.model.loading import Loaded, load
from kvscope.model.pipeline import Pipeline, threads_for
from kvscope.model.plan import RecordingPlan, heads_of, layers_of, planned
from kvscope.model.prefill import chunk_size
from kvscope.model.prompts import Prompt, encode, read_prompts, token_texts
from kvscope.model.recorder import Recorder
from kvscope.model.sampling import Chooser, Sampling
from kvscope.model.selfcheck import self_check
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import SequenceRecord
from kvscope.trace.schema import MAPS, STORES, parse_store
from kvscope.trace.space import require_space
from kvscope.trace.writer import TraceWriter

GATE = "gate.safetensors"  # file beside a model whose gates need its layer inputs
LOGIT_BLOCK = 256  # positions whose logits are normalised at a time
Score = tuple[NDArray[Any], NDArray[Any]]  # log-probability and entropy of some tokens


@dataclass(frozen=True)
class Progress:
    """How far a recording is: tokens done, tokens in all (at most), bytes written."""

    done: int
    total: int
    bytes: int


def trace(
    model: str,
    prompts: Sequence[Path | str],
    *,
    output: Path | None = None,
    continuation: Path | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    query_stride: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    chat: bool = False,
    trust_remote_code: bool = False,
    query_block: int = 128,
    prefill_chunk: int | None = None,
    store: str = MAPS,
    hidden: bool | None = None,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[RecordingPlan], None] | None = None,
) -> Trace:
    """Return the recorded trace of a model that reads prompts and continues them.

    Parameters
    ----------
    model : str
        ``demo``, an alias (``llama2-7b``), a Hub id, or a local folder.
    prompts : sequence of Path
        Text files, one sequence each, or ``.jsonl`` files with a ``prompt`` (and perhaps a ``continuation``) per line.
    output : Path, optional
        Folder of the trace; ``traces/NAME`` by default.
    continuation : Path, optional
        Text that is forced after every prompt instead of generating (teacher forcing).
    layers : sequence of int, optional
        Layers to record; all by default.
    heads : sequence of int, optional
        Query heads to record, in whole groups that share keys and values; all by default.
    query_stride : int
        Every how many-th row of attention to record. Such a trace can be read, and not be replayed.
    max_new_tokens : int
        Tokens after the prompt, at most.
    seed, do_sample, temperature, top_p, top_k
        Sampling, as in transformers; the likeliest token by default.
    dtype, device, device_map, revision, trust_remote_code
        How the model is loaded, as in transformers.
    chat : bool
        Whether to wrap each prompt in the model's chat template.
    query_block : int
        Queries whose rows exist at a time.
    prefill_chunk : int, optional
        Tokens of a prompt that go through the model at a time; by default as many as bound the memory for logits.
    store : str
        ``maps``; ``maps+vectors``: also the queries, keys and values of every token, exactly (`Trace.states`); or
        ``qkv``: these alone, which grow with the length and not with its square, and from which the trace recomputes
        the rest when it is read; or ``topk:64``: the 64 heaviest keys of every row and sums of columns, from which the
        trace rebuilds rows approximately, and says so.
    hidden : bool, optional
        Whether to record layer inputs too, from which gates decide; by default where a gate lies beside the model, as
        it does beside ``demo``.
    force : bool
        Whether to replace an existing trace.
    progress, announce : callable, optional
        Called with `Progress` while it runs, and with the `RecordingPlan` before it starts.

    Raises
    ------
    UsageError
        An empty prompt, one that does not fit the context, an unknown layer, a bad setting.
    ModelError
        The model cannot be loaded or watched, or the self-check fails.
    TraceError
        The trace exists, or the disk cannot hold it.
    """
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens={max_new_tokens} is negative", "Use 0 or more.")
    if query_block < 1:
        raise UsageError(f"query_block={query_block} is below 1", "Use 1 or more.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UsageError(f"prefill_chunk={prefill_chunk} is below 1", "Use 1 or more.")
    if query_stride < 1:
        raise UsageError(f"query_stride={query_stride} is below 1", "Use 1 or more.")
    kind, _ = parse_store(store)
    if query_stride > 1 and "maps" not in STORES[kind]:
        raise UsageError(f"store {store} has no every n-th row", f"Use --query-stride with --store {MAPS}.")
    sampling = Sampling(do_sample, temperature, top_p, top_k)
    texts = read_prompts(prompts, continuation)
    loaded = load(
        model, revision=revision, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
    )
    require_registry(loaded.model)
    made = [encode(loaded, *text, chat=chat, max_new_tokens=max_new_tokens) for text in texts]
    chosen = layers_of(loaded, layers)
    hidden = (Path(loaded.source) / GATE).is_file() if hidden is None else hidden
    path = Path("traces") / f"{Path(texts[0][0]).stem}-{Path(model).name}" if output is None else Path(output)
    with torch.inference_mode(), _memory(model):
        facts = self_check(loaded.model, torch.tensor([made[0].ids], device=loaded.device))
        chunk = chunk_size(loaded, facts, max(len(p.ids) + len(p.forced or []) for p in made), prefill_chunk)
        part = heads_of(loaded, facts, heads)
        known = header(
            loaded,
            facts,
            chosen,
            made,
            sampling,
            store=store,
            hidden=hidden,
            head_numbers=part,
            query_stride=query_stride,
            seed=seed,
            command=command,
            prefill_chunk=chunk,
        )
        lengths = [len(p.ids) + (max_new_tokens if p.forced is None else len(p.forced)) for p in made]
        plan = planned(path, known, lengths, loaded.text_config.hidden_size)
        if announce is not None:
            announce(plan)
        require_space(path, plan.bytes)
        with TraceWriter(path, known, force=force) as writer:
            with Pipeline(threads_for(loaded.device)) as pipeline:
                recorder = Recorder(
                    writer,
                    chosen,
                    query_block,
                    store=store,
                    hidden=hidden,
                    heads=part,
                    query_stride=query_stride,
                    pipeline=pipeline,
                )
                run = _Run(loaded, writer, recorder, plan, progress)
                done = [
                    run.sequence(n, prompt, max_new_tokens, sampling.chooser(seed + n)) for n, prompt in enumerate(made)
                ]
            writer.finish(done)
    return open_trace(path)


class _Run:
    """One recording: sequences go through the model one after the other."""

    def __init__(
        self,
        loaded: Loaded,
        writer: TraceWriter,
        recorder: Recorder,
        plan: RecordingPlan,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.loaded, self.writer, self.recorder, self.chunk = loaded, writer, recorder, plan.prefill_chunk
        self.total, self.done, self.progress = plan.tokens, 0, progress
        self.stops = _stop_ids(loaded)

    def sequence(self, number: int, prompt: Prompt, new: int, choose: Chooser) -> SequenceRecord:
        """Record one sequence; returns its entry for the header."""
        self.recorder.begin(number, len(prompt.ids))
        with watching(self.loaded.model, self.recorder):
            if prompt.forced is not None:
                ids, scores = self._forced(prompt.ids + prompt.forced)
            else:
                ids, scores = self._generated(prompt.ids, new, choose)
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
        self._tell(0)
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
            self._tell(1)
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
            self._tell(len(logits))
            del logits  # before the next chunk makes its own
        return scores, last

    def _forward(self, tokens: Tensor, cache: DynamicCache | None) -> Any:
        return self.loaded.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)

    def _tell(self, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(Progress(self.done, self.total, self.writer.bytes_written))


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


class _memory:
    """Turns running out of memory into an error that says what to change."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        text = str(error).lower()
        if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
            raise out_of_memory(self.name) from error
