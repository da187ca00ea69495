"""``kvscope.perplexity`` and ``kvscope.verify``: the closed loop in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvscope.closed_loop.compile import Budgets, Policies, compile_perplexity, compile_verify
from kvscope.closed_loop.verify import Verdict
from kvscope.core.options import (
    ClosedLoopOptions,
    ModelSource,
    OutputOptions,
    PerplexityOptions,
    PlanOptions,
    Positions,
    Prefill,
    VerifyOptions,
    choice,
)
from kvscope.results.place import written
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

Progress = Callable[[float], None]


def perplexity(
    model: str,
    files: Path | str | Sequence[Path | str],
    policies: Policies,
    budgets: Budgets = "20%",
    *,
    output: Path | str | None = None,
    prompt: int = 1,
    window: int | None = None,
    max_windows: int | None = None,
    metrics: Sequence[str] | None = None,
    positions: str = Positions.original,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    scope: str | None = None,
    cache: str | Sequence[str] = (),
    merge: str | Sequence[str] = (),
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Replay:
    """Return the perplexity of text files under each policy, which evicts inside the model's attention.

    Parameters
    ----------
    model : str
        Name of a model, as of ``kvscope models``: a Hub id, a local folder, ``demo``.
    files : Path, str, or sequence of these
        Text files; each is divided into windows, and each window is one sequence of the result.
    policies, budgets, output
        See `kvscope.replay`.
    prompt, window, max_windows, metrics, positions, params, compress, allocate, scope, cache, merge
        See `PerplexityOptions` and `PlanOptions`; `cache` and `merge` as on the command line: ``"16bit,int4"``.
    dtype, device, revision
        See `ModelSource`.
    force : bool
        Whether an existing replay at `output` may be replaced.
    progress : callable, optional
        Called with the completed share, from 0 to 1.

    Raises
    ------
    UsageError, ModelError, ReplayError
        As `compile_perplexity` and its job.
    """
    texts = [files] if isinstance(files, (str, Path)) else list(files)
    options = PerplexityOptions(
        plan=PlanOptions(params or {}, compress, allocate, scope=scope, caches=cache, merges=merge),
        positions=choice(Positions, positions, "positions"),
        metrics=None if metrics is None else tuple(metrics),
        window=window,
        max_windows=max_windows,
        prompt=prompt,
    )
    source = ModelSource(model, revision, dtype, device)
    job = compile_perplexity(source, [Path(text) for text in texts], policies, budgets, options)
    return written(lambda path: job.execute(OutputOptions(path, force), progress), output)


def verify(
    trace: Trace,
    policies: Policies,
    budgets: Budgets = "20%",
    *,
    prefill: str = Prefill.full,
    tokens: int | None = 128,
    sequences: int = 1,
    positions: str = Positions.original,
    model: str | None = None,
    dtype: str = "float64",
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    scope: str | None = None,
    cache: str | Sequence[str] = (),
    merge: str | Sequence[str] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Verdict]:
    """Return how the closed loop agrees with token-by-token decoding that removes evicted keys from the cache.

    Parameters
    ----------
    trace : Trace
        A trace of a model; its tokens are decoded.
    policies, budgets
        See `kvscope.replay`.
    prefill, tokens, sequences, params, compress, allocate, scope, cache, merge, device
        As in `VerifyOptions` and `PlanOptions`.
    positions, model, dtype
        As in `ClosedLoopOptions`.
    progress : callable, optional
        Called with the completed share, from 0 to 1.

    Raises
    ------
    UsageError, TraceError, ModelError, ReplayError
        As `compile_verify` and its job.
    """
    options = VerifyOptions(
        prefill=choice(Prefill, prefill, "prefill"),
        plan=PlanOptions(params or {}, compress, allocate, scope=scope, caches=cache, merges=merge),
        closed=ClosedLoopOptions(choice(Positions, positions, "positions"), model, dtype),
        tokens=tokens,
        sequences=sequences,
        device=device,
    )
    return compile_verify(trace, policies, budgets, options).execute(progress)
