"""Training of scorers, which predict from layer inputs what a second reading of a prompt says of its keys.

As in KVzap (arXiv:2601.07891; code NVIDIA/kvpress, ``kvzap/train.py``): ridge regression for linear scorers, and for
those with a hidden layer the mean square error, AdamW, a cosine schedule and clipped gradients. Ours: layers are
trained one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.core.gate_options import ScorerSettings
from kvscope.core.memory import memory_explained
from kvscope.core.version import versions
from kvscope.gates.scorers import KeyScorers, LayerScorer, ScorerFacts
from kvscope.trace.reader import Trace
from kvscope.training.tasks import HELD_OUT

RIDGE = 1.0  # weight of the squared parameters of a linear scorer beside the sum of squared errors
CLIP = 1.0  # largest norm of a step's gradient
LEAST = 1e-12  # weights below count as this one: the logarithm of 0 is not finite


@dataclass(frozen=True)
class TrainedScorers:
    """Scorers, their file, and for each layer how well they predict held-out prompts.

    Attributes
    ----------
    path : Path
        The file.
    scorers : KeyScorers
        The scorers.
    explained : list of float
        Of each layer the share of the variance of the logarithms that is predicted, at most 1.
    rank : list of float
        Of each layer Spearman's correlation of predicted and true scores of a prompt, mean over prompts and heads.
    """

    path: Path
    scorers: KeyScorers
    explained: list[float]
    rank: list[float]


def train_scorers(
    traces: Sequence[Trace],
    output: Path,
    settings: ScorerSettings = ScorerSettings(),  # noqa: B008  frozen
    progress_callback: Callable[[int], None] | None = None,
) -> TrainedScorers:
    """Train scorers on the prompts of traces that were read again, write them to `output` and return them.

    Parameters
    ----------
    traces : sequence of Trace
        Traces of one model with layer inputs and second readings, together two prompts or more; every fifth is held
        out.
    output : Path
        File to write; an existing file is replaced.
    settings : ScorerSettings
        Width of the scorers, and settings of the training.
    progress_callback : callable, optional
        Called after every layer with how many are trained.

    Raises
    ------
    TraceError
        If a trace lacks layer inputs, a second reading or layers, or the traces are of different models.
    UsageError
        If there are fewer than two prompts.
    ModelError
        If the layers of the model differ in their heads, or a loss is not finite.
    """
    for trace in traces:
        _require(trace, traces[0])
    every = [(trace, sequence.index) for trace in traces for sequence in trace.sequences]
    if len(every) < 2:
        raise UsageError(
            "one prompt is too few to train and evaluate scorers", "Name traces with two or more prompts in all."
        )
    torch.manual_seed(settings.seed)
    scorers = KeyScorers(_facts(traces[0], settings))
    explained: list[float] = []
    rank: list[float] = []
    with memory_explained(" while scorers were trained", "Lower --tokens."):
        for layer, scorer in enumerate(scorers.layers):
            assert isinstance(scorer, LayerScorer)
            _train(scorer, *_examples(every, layer, settings), settings)
            share, ranks = _evaluated(scorer, every, layer)
            explained.append(share)
            rank.append(ranks)
            if progress_callback is not None:
                progress_callback(layer + 1)
    about = {
        **asdict(settings),
        "traces": [trace.identity for trace in traces],
        "prompts": len(every),
        "explained": explained,
        "rank": rank,
        "versions": versions("torch"),
    }
    scorers.facts = replace(scorers.facts, provenance=about)
    scorers.write(output)
    return TrainedScorers(output, scorers.requires_grad_(False).eval(), explained, rank)


def _facts(trace: Trace, settings: ScorerSettings) -> ScorerFacts:
    """Return the facts about scorers for the model of a trace, without provenance."""
    header = trace.header
    return ScorerFacts(
        model=str(header.model.id),
        layers=header.n_layers,
        hidden=trace.hidden(0, trace.layers[0]).shape[-1],
        kv_heads=header.kv_heads,
        width=settings.width,
        weights=list(header.model.weights or ()),
    )


def pair(trace: Trace, sequence: int, layer: int) -> tuple[Tensor, Tensor]:
    """Return the inputs ``[P, hidden]`` of a layer, and the logarithms ``[P, G]`` of what the second reading says."""
    prompt = trace.sequences[sequence].prompt
    hidden = torch.from_numpy(trace.hidden(sequence, layer)[:prompt])
    weight = torch.from_numpy(trace.key_numbers("reconstruction", sequence, layer)[:, :prompt])
    return hidden.float(), weight.double().clamp(min=LEAST).log().float().T


def _examples(every: Sequence[tuple[Trace, int]], layer: int, settings: ScorerSettings) -> tuple[Tensor, Tensor]:
    """Return the inputs ``[n, hidden]`` and logarithms ``[n, G]`` of random tokens of prompts not held out."""
    parts = []
    for number, one in enumerate(every):
        if number % HELD_OUT == 1:
            continue
        hidden, target = pair(*one, layer)
        random = torch.Generator().manual_seed(1_000_003 * settings.seed + number)
        chosen = torch.randperm(len(hidden), generator=random)[: settings.tokens]
        parts.append((hidden[chosen], target[chosen]))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _train(scorer: LayerScorer, hidden: Tensor, target: Tensor, settings: ScorerSettings) -> None:
    """Fit a scorer in place."""
    if scorer.inner is None:
        _solve(scorer, hidden.double(), target.double())
        return
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=settings.rate)
    random = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
        order = torch.randperm(len(hidden), generator=random)
        for start in range(0, len(order), settings.batch):
            batch = order[start : start + settings.batch]
            loss = functional.mse_loss(scorer(hidden[batch]), target[batch])
            if not bool(loss.isfinite()):
                raise ModelError(f"the loss of epoch {epoch} is not finite", "Lower --rate.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), CLIP)
            optimizer.step()


@torch.no_grad()
def _solve(scorer: LayerScorer, hidden: Tensor, target: Tensor) -> None:
    """Set a linear scorer to the solution of ridge regression, with a constant that is not penalised."""
    centre, mean = hidden.mean(0), target.mean(0)
    inputs = hidden - centre
    squares = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    weight = torch.linalg.solve(squares, inputs.T @ (target - mean)).T  # [G, hidden]
    scorer.outer.weight.copy_(weight)
    scorer.outer.bias.copy_(mean - weight @ centre)


@torch.no_grad()
def _evaluated(scorer: LayerScorer, every: Sequence[tuple[Trace, int]], layer: int) -> tuple[float, float]:
    """Return the share of the variance that is explained, and the mean correlation of ranks, on held-out prompts."""
    error = spread = 0.0
    ranks = []
    for one in every[1::HELD_OUT]:
        hidden, target = pair(*one, layer)
        found = scorer(hidden)
        error += float((found - target).square().sum())
        spread += float((target - target.mean(0)).square().sum())
        ranks += [spearman(of_head, true) for of_head, true in zip(found.T, target.T, strict=True)]
    return 1 - error / spread if spread else 0.0, float(np.mean(ranks))


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the correlation of the ranks of two sequences ``[n]``, ties in order of position; 0 below two entries."""
    if len(one) < 2:
        return 0.0
    ranks = torch.stack([part.argsort(stable=True).argsort() for part in (one, other)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _require(trace: Trace, other: Trace) -> None:
    """Raise an error unless a trace has what training needs, and is of the same model as `other`."""
    for stored, what in (("hidden", "layer inputs"), ("reconstruction", "second readings of its prompts")):
        if stored not in trace.stored:
            raise TraceError(
                f"{trace.path} has no {what}, which scorers are trained on", "Record it again with --hidden --reread."
            )
    header = trace.header
    if header.layer_heads or header.head_numbers or len(trace.layers) != header.n_layers:
        raise TraceError(
            f"{trace.path} does not hold the same heads of every layer of its model, which scorers need",
            "Record all layers and heads, of a model whose layers have equally many heads.",
        )
    if header.model.weights != other.header.model.weights:
        raise TraceError(f"{trace.path} and {other.path} are of different models", "Name traces of one model.")
