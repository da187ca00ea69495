"""Whether a plan can run inside a model, where attention is computed over the visible keys only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Loop, Positions
from kvscope.engine.plan import FILTER, GATE, EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.engine.signal_axes import VECTORS
from kvscope.engine.signals import ROWS
from kvscope.model.derotation import Derotation, derotations
from kvscope.model.selfcheck import self_check

SIGNALS = frozenset(
    {*VECTORS, "mean_query", "value_l1", "value_l2", "key_l2", "value_out_l1", "reconstruction", "rotary"}
)


def closed_runs(
    runs: Sequence[RunSpec], positions: Positions, opened: Sequence[RunSpec] | None = None
) -> list[RunSpec]:
    """Return a closed run for each run, except those of clairvoyant bounds; numbers follow those of the open runs.

    `opened` are the runs of the open loop; by default all of them.
    """
    opened = runs if opened is None else opened
    numbers = {(run.plan, run.budget, run.cache): run.number for run in opened}
    feasible = [run for run in runs if not run.plan.policy.traits.clairvoyant]
    return [
        replace(
            run,
            number=number,
            loop=Loop.closed,
            positions=positions,
            open_run=numbers.get((run.plan, run.budget, run.cache)),
        )
        for number, run in enumerate(feasible, start=len(opened))
    ]


def require_closed(plan: EvictionPlan, positions: Positions = Positions.original) -> None:
    """Raise UsageError if a plan needs attention that the closed loop does not compute, or has no compacted form."""
    traits = plan.policy.traits
    why = None
    if traits.clairvoyant:
        why = "needs future attention, which depends on what it evicts"
    elif "selection" in plan.needs:
        why = "follows the index of a model, which the trace of the model has alone"
    elif "full_weights" in plan.needs and not traits.reads:
        why = "needs the attention on keys that it has evicted"
    elif positions == Positions.compacted and traits.reads:
        why = "holds every key, so there is nothing to compact"
    if why:
        raise UsageError(
            f"{plan.label} cannot run in the closed loop with {positions} positions: it {why}", "Use another policy."
        )


def require_decodable(plan: EvictionPlan) -> None:
    """Raise UsageError if a plan needs more than a shortened cache holds, or a signal that decoding lacks."""
    if plan.policy.traits.reads or "full_weights" in plan.needs:
        why = "reads" if plan.policy.traits.reads else "observes the attention on"
        raise UsageError(
            f"{plan.policy.label} {why} keys that a shortened cache does not hold, so it cannot be decoded with one",
            "Use another policy, or replay this one in the closed loop.",
        )
    unknown = {name for name in plan.needs - ROWS - SIGNALS if not name.startswith((GATE, FILTER))}
    if unknown:
        raise UsageError(
            f"{plan.policy.label} needs a signal called {sorted(unknown)[0]!r}, which decoding does not provide",
            f"Use one of the known signals: {', '.join(sorted(ROWS | SIGNALS))}.",
        )


def require_quantisable(model: CausalModel, passages: Sequence[Passage], runs: Sequence[RunSpec]) -> None:
    """Raise UsageError if caches are to be quantised where that is not defined."""
    schemes = [run.cache for run in runs if run.cache is not None]
    if not schemes:
        return
    if runs[0].positions == Positions.compacted:
        raise UsageError(
            f"positions cannot be compacted with a cache in {schemes[0]}: its keys are quantised at their positions",
            "Use --positions original, or --cache 16bit.",
        )
    probe = passages[0].text_ids[None].to(model.get_input_embeddings().weight.device)
    if self_check(model, probe).latent_size is not None:
        raise UsageError(
            f"{type(model).__name__} caches latent vectors, from which keys and values are computed: {schemes[0]} is "
            "defined for keys and values",
            "Use --cache 16bit, or another model.",
        )
    before = [scheme for scheme in schemes if scheme.before_rotation]
    if before and any(passage.images for passage in passages):
        raise UsageError(
            f"{before[0]} quantises keys without their position, which in prompts with images may have two dimensions",
            "Quantise keys after rotation: --cache int4:kivi.",
        )


def require_positions(passages: Sequence[Passage], runs: Sequence[RunSpec]) -> None:
    """Raise UsageError if positions are to be compacted, or read, in a text with images: some have several numbers."""
    reads = [run.plan for run in runs if "rotary" in run.plan.needs]
    if reads and any(passage.images for passage in passages):
        raise UsageError(
            f"{reads[0].label} reads positions, which may have two dimensions in prompts with images",
            "Use another policy, or prompts without images.",
        )
    if any(passage.images for passage in passages) and runs[0].positions == Positions.compacted:
        raise UsageError(
            "positions cannot be compacted in prompts with images, whose positions may have two dimensions",
            "Use the original positions: --positions original.",
        )


def unrotated_of(model: CausalModel, token: Tensor, runs: Sequence[RunSpec]) -> dict[int, Derotation]:
    """Return the rotation of each layer if a cache of some run quantises keys without it; otherwise nothing.

    Raises
    ------
    ModelError
        If the model has none that can be inverted.
    """
    if not any(run.cache is not None and run.cache.before_rotation for run in runs):
        return {}
    return derotations(model, token, "Quantise keys after rotation: --cache int4:kivi.")
