"""Language modelling under a cache limit, straight from text files: the protocol of papers that report perplexity."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvscope.closed_loop.evaluate import Passage, evaluate
from kvscope.closed_loop.options import require_closed
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.engine.plan import EvictionPlan, protection
from kvscope.engine.provenance import info
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.metrics import METRICS
from kvscope.model.attention_hook import require_registry
from kvscope.model.loading import Loaded, load
from kvscope.model.prompts import read_text
from kvscope.model.selfcheck import self_check
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import TokenSequence

DEFAULT_WINDOW = 1024
FEWEST = 8  # tokens of a last window that is shorter than the others


def perplexity(
    model: str,
    files: Sequence[Path],
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    *,
    output: Path,
    window: int | None = None,
    max_windows: int | None = None,
    prompt: int = 1,
    metrics: Sequence[str] | None = None,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    positions: Positions = Positions.original,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[float], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return what policies cost in perplexity on text files, in the closed loop.

    The tokens of each file are cut into windows, each of which begins with the tokenizer's first token, if it has one,
    and an empty cache. All other tokens are scored while the cache is held to the budget: streaming prefill. With a
    `prompt`, that many tokens of each window are read with the full cache first, and are not scored.

    Parameters
    ----------
    model : str
        As for a trace: an alias, a Hub id, a local folder.
    files : sequence of Path
        UTF-8 texts.
    policies, budgets, metrics, params, compress, allocate, progress, command, force
        As in `replay`.
    output : Path
        Folder to write: ``reports/NAME``.
    window : int, optional
        Tokens of a window; by default the model's context, at most 1,024.
    max_windows : int, optional
        Windows of each file; all by default.
    prompt : int
        Tokens of each window that are read before any choice is made.
    positions : {"original", "compacted"}
        Whether keys keep the rotation of their place in the text, or get that of their place in the cache.
    dtype, device, device_map, revision, trust_remote_code
        As for a trace.

    Raises
    ------
    UsageError
        Unknown names, parameters or budgets; a text too short; a window beyond the context.
    ModelError
        The model cannot be loaded or watched.
    ReplayError
        If a self-check fails.
    ResultError
        If the output exists, or cannot be written.
    """
    plans = [EvictionPlan.make(policy, compress, allocate) for policy in parse_policies(policies, params)]
    if not plans:
        raise UsageError("no policy is named", "Name one or more: --policy h2o --policy tova")
    for plan in plans:
        require_closed(plan, positions)
    runs = runs_of(plans, parse_budgets(budgets), loop=Loop.closed, positions=positions)
    wanted = [METRICS.get(name) for name in (metrics or METRICS.names())]
    if not files:
        raise UsageError("no text is named", "Name one or more text files.")
    texts = [read_text(file) for file in files]
    loaded = load(
        model, revision=revision, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
    )
    require_registry(loaded.model)
    size = _window(loaded, window, prompt)
    passages = _passages(loaded, files, texts, size, max_windows, prompt)
    prefill = Prefill.stream if prompt == 1 else Prefill.full
    _require_room(runs, passages, prefill)
    about = _about(loaded, files, texts, passages, size)
    for plan in plans:
        plan.policy.fit(about["layers"], about["kv_heads"], len(about["layers"]))
    started = time.monotonic()
    sequences = [passage.sequence for passage in passages]
    with ReplayWriter(output, info(about, sequences, runs, wanted, prefill, command), force=force) as writer:
        tally = evaluate(loaded.model, passages, runs, wanted, prefill, writer, progress=progress)
        counted = {run.number: tally.of(run.number) for run in runs}
        return writer.finish(counted, seconds=round(time.monotonic() - started, 3))


def _window(loaded: Loaded, window: int | None, prompt: int) -> int:
    context = loaded.context
    size = window or min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    if context is not None and size > context:
        raise UsageError(f"a window of {size} tokens is more than the model's context of {context}", "Lower --window.")
    if not 1 <= prompt < size:
        raise UsageError(f"a prompt of {prompt} tokens leaves nothing of a window of {size}", "Lower --prompt-length.")
    return size


def _passages(
    loaded: Loaded, files: Sequence[Path], texts: Sequence[str], size: int, most: int | None, prompt: int
) -> list[Passage]:
    """Return the windows of all texts."""
    found: list[Passage] = []
    for file, text in zip(files, texts, strict=True):
        for number, ids in enumerate(_windows(loaded, text, size)):
            if most is not None and number >= most:
                break
            if len(ids) > max(prompt, FEWEST):
                found.append(Passage(TokenSequence(len(found), prompt, len(ids), True), torch.tensor(ids)))
        if not found or len(found[-1].ids) <= prompt:
            raise UsageError(f"text {file} has too few tokens", f"Give it more than {max(prompt, FEWEST)}.")
    return found


def _windows(loaded: Loaded, text: str, size: int) -> Iterator[list[int]]:
    tokenizer = loaded.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [tokenizer.bos_token_id] if tokenizer("", verbose=False)["input_ids"][:1] else []
    step = size - len(first)
    for start in range(0, len(ids), step):
        yield first + ids[start : start + step]


def _require_room(runs: Sequence[RunSpec], passages: Sequence[Passage], prefill: Prefill) -> None:
    for run in runs:
        run.plan.require(prefill)
        for passage in passages:
            protection(run.plan.policy, run.keys(passage.sequence, prefill), passage.sequence.prompt)


def _about(
    loaded: Loaded, files: Sequence[Path], texts: Sequence[str], passages: Sequence[Passage], size: int
) -> dict[str, Any]:
    """Return what ``run.json`` says of the texts."""
    with torch.inference_mode():
        facts = self_check(loaded.model, passages[0].ids[None].to(loaded.device))
    if facts.heads % facts.kv_heads:
        raise ModelError(f"{loaded.name} has {facts.heads} heads over {facts.kv_heads}", "Use another model.")
    identity = hashlib.sha256(f"{loaded.source} {loaded.revision}".encode())
    for passage in passages:
        identity.update(passage.ids.numpy().tobytes())
    return {
        "name": Path(files[0]).stem if len(files) == 1 else f"{Path(files[0]).stem}+{len(files) - 1}-more",
        "kind": "text",
        "identity": identity.hexdigest(),
        "model": loaded.name,
        "sequences": [{"prompt": p.sequence.prompt, "length": p.sequence.length} for p in passages],
        "layers": sorted(facts.windows),
        "heads": facts.heads,
        "kv_heads": facts.kv_heads,
        "protocol": "text",
        "window": size,
        "texts": [
            {"file": str(file), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for file, text in zip(files, texts, strict=True)
        ],
    }
