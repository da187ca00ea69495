"""Generate with a real model and record its trace."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvscope.errors import ModelError, UsageError
from kvscope.model.attention_hook import require_registry, watching
from kvscope.model.loading import Loaded, load, out_of_memory
from kvscope.model.prompts import Prompt, encode, read_prompts, token_texts
from kvscope.model.recorder import Recorder
from kvscope.model.selfcheck import Facts, self_check
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.schema import MAPS, MAPS_AND_VECTORS, STORES, VECTORS, TraceHeader, estimate_bytes
from kvscope.trace.writer import TraceWriter, free_bytes, require_space

LOGIT_BLOCK = 256  # positions whose logits are normalised at a time
Chooser = Callable[[Tensor, Tensor], int]  # from ids [1, t] and logits [1, vocabulary] to the next token
Score = tuple[NDArray[Any], NDArray[Any]]  # log-probability and entropy of some tokens


@dataclass(frozen=True)
class Plan:
    """What a recording will be: where, how many bytes about, and how many are free there."""

    path: Path
    bytes: int
    free: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class Progress:
    """How far a recording is: tokens done, tokens in all (at most), bytes written."""

    done: int
    total: int
    bytes: int


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; names and meaning as in transformers' ``generate``."""

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

    def chooser(self, seed: int) -> Chooser:
        """Return what picks the next token; sampling is seeded."""
        if not self.do_sample:
            return lambda ids, logits: int(logits.argmax(-1))
        warpers: Any = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        generator = torch.Generator().manual_seed(seed)

        def choose(ids: Tensor, logits: Tensor) -> int:
            share = torch.softmax(warpers(ids, logits.float()), -1).cpu()
            return int(torch.multinomial(share, 1, generator=generator))

        return choose


def trace(
    model: str,
    prompts: Sequence[Path | str],
    *,
    output: Path | None = None,
    continuation: Path | None = None,
    layers: Sequence[int] | None = None,
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
    store: str = MAPS,
    force: bool = False,
    command: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[Plan], None] | None = None,
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
    store : str
        ``maps``, or ``maps+vectors``: also the queries, keys and values of every token, exactly (`Trace.states`).
    force : bool
        Whether to replace an existing trace.
    progress, announce : callable, optional
        Called with `Progress` while it runs, and with the `Plan` before it starts.

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
    if store not in STORES:
        raise UsageError(f"store {store!r} is unknown", f"Use one of: {', '.join(STORES)}.")
    vectors = VECTORS if store == MAPS_AND_VECTORS else ()
    sampling = Sampling(do_sample, temperature, top_p, top_k)
    texts = read_prompts(prompts, continuation)
    loaded = load(
        model, revision=revision, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
    )
    require_registry(loaded.model)
    made = [encode(loaded, *text, chat=chat, max_new_tokens=max_new_tokens) for text in texts]
    chosen = _layers(loaded, layers)
    path = Path("traces") / f"{Path(texts[0][0]).stem}-{Path(model).name}" if output is None else Path(output)
    with torch.inference_mode(), _memory(model):
        facts = self_check(loaded.model, torch.tensor([made[0].ids], device=loaded.device))
        header = _header(loaded, facts, chosen, made, sampling, seed, command, vectors)
        lengths = [len(p.ids) + (max_new_tokens if p.forced is None else len(p.forced)) for p in made]
        needed = estimate_bytes(
            layers=len(chosen),
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            lengths=lengths,
            vectors=vectors,
        )
        if announce is not None:
            announce(Plan(path, needed, free_bytes(path), len(made), sum(lengths)))
        require_space(path, needed)
        with TraceWriter(path, header, force=force) as writer:
            recorder = Recorder(writer, chosen, query_block, vectors=bool(vectors))
            run = _Run(loaded, writer, recorder, sum(lengths), progress)
            sequences = []
            for number, prompt in enumerate(made):
                choose = sampling.chooser(seed + number)
                sequences.append(run.sequence(number, prompt, max_new_tokens, choose))
            writer.finish(sequences)
    return open_trace(path)


class _Run:
    """One recording: sequences go through the model one after the other."""

    def __init__(
        self,
        loaded: Loaded,
        writer: TraceWriter,
        recorder: Recorder,
        total: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.loaded, self.writer, self.recorder = loaded, writer, recorder
        self.total, self.done, self.progress = total, 0, progress
        self.stops = _stop_ids(loaded)

    def sequence(self, number: int, prompt: Prompt, new: int, choose: Chooser) -> dict[str, Any]:
        """Record one sequence; returns its entry for the header."""
        self.recorder.begin(number)
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
        return {"prompt": len(prompt.ids), "length": len(ids), "forced": prompt.forced is not None}

    def _forced(self, ids: list[int]) -> tuple[list[int], list[Score]]:
        tokens = torch.tensor([ids], device=self.loaded.device)
        logits = self._forward(tokens, None).logits[0]
        self._tell(len(ids))
        return ids, _scores(logits[:-1], tokens[0, 1:])

    def _generated(self, prompt: list[int], new: int, choose: Chooser) -> tuple[list[int], list[Score]]:
        """Decode token by token; the last token goes through the model too, so that every token has its rows."""
        cache = DynamicCache(config=self.loaded.model.config)
        tokens = torch.tensor([prompt], device=self.loaded.device)
        logits = self._forward(tokens, cache).logits[0]
        scores = _scores(logits[:-1], tokens[0, 1:])
        self._tell(len(prompt))
        ids, last = list(prompt), logits[-1:]
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


def _layers(loaded: Loaded, wanted: Sequence[int] | None) -> list[int]:
    count = loaded.text_config.num_hidden_layers
    for layer in wanted or []:
        if not 0 <= layer < count:
            raise UsageError(f"no layer {layer} in {loaded.name}", f"Its layers are 0 to {count - 1}.")
    return sorted(set(wanted)) if wanted else list(range(count))


def _stop_ids(loaded: Loaded) -> frozenset[int]:
    ids = loaded.model.generation_config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _header(
    loaded: Loaded,
    facts: Facts,
    layers: list[int],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    command: str | None,
    vectors: Sequence[str],
) -> TraceHeader:
    missing = [layer for layer in layers if layer not in facts.windows]
    if missing:
        raise ModelError(
            f"layers {missing} of {loaded.name} have no attention",
            f"Record the others: --layers {','.join(map(str, facts.windows))}",
        )
    windows = [facts.windows[layer] for layer in layers]
    config = loaded.model.config
    return TraceHeader(
        source="model",
        protocol="forced" if all(prompt.forced is not None for prompt in prompts) else "generated",
        model={
            "id": loaded.name if loaded.name == loaded.source or loaded.name == "demo" else loaded.source,
            "revision": loaded.revision,
            "class": type(loaded.model).__name__,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "config": json.loads(json.dumps(config.to_dict(), default=str)),
            "attention": {"kernel": config._attn_implementation, "scaling": facts.scaling},
        },
        layers=layers,
        n_layers=loaded.text_config.num_hidden_layers,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        layer_types=["full" if window is None else "sliding" for window in windows],
        sliding_window=windows,
        learned_sinks=facts.learned_sinks,
        softcap=facts.softcap,
        stored=[
            "maps",
            "value_l1",
            "value_l2",
            "key_l2",
            "similarity",
            "queries",
            *(f"vectors:{name}" for name in vectors),
        ],
        prompts=[
            {"file": prompt.file, "sha256": hashlib.sha256(prompt.text.encode()).hexdigest(), "tokens": len(prompt.ids)}
            for prompt in prompts
        ],
        device=str(loaded.device),
        seed=seed,
        sampling={name: getattr(sampling, name) for name in ("do_sample", "temperature", "top_p", "top_k")},
        tokenizer=type(loaded.tokenizer).__name__,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvscope", "torch", "transformers", "pyarrow")},
        },
        command=command,
    )


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
