"""Which texts and caches a loaded model of the closed loop can run with, before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvscope.closed_loop.feasible import require_merging
from kvscope.closed_loop.passage import Passage, probe_of
from kvscope.core.errors import UsageError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Positions
from kvscope.engine.runs import RunSpec
from kvscope.model.derotation import Derotation, derotations
from kvscope.model.selfcheck import self_check


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
    if self_check(model, probe_of(model, passages)).latent_size is not None:
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


def require_mergeable(model: CausalModel, passages: Sequence[Passage], runs: Sequence[RunSpec]) -> None:
    """Raise UsageError if evicted keys are to be merged where that is not defined."""
    merges = [run.merge for run in runs if run.merge is not None]
    if not merges:
        return
    rule, instead = merges[0], "Use another model, or omit --merge."
    if runs[0].positions == Positions.compacted:
        raise UsageError(
            f"positions cannot be compacted with --merge {rule}: keys are merged at their positions in the text",
            "Use --positions original.",
        )
    for run in runs:
        require_merging(run.plan, () if run.merge is None else str(run.merge))
    name, facts = type(model).__name__, self_check(model, probe_of(model, passages))
    if facts.latent_size is not None:
        raise UsageError(
            f"{name} caches latent vectors, from which keys and values are computed: {rule} is defined for keys",
            instead,
        )
    if facts.shared:
        raise UsageError(
            f"layers of {name} read the cache of another layer, whose keys {rule} would change between them", instead
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
