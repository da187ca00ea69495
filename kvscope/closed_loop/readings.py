"""Second readings of prompts in the closed loop, which has the model at hand; see `kvscope.model.second_reading`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.model.loading import Loaded
from kvscope.model.second_reading import second_reading


def with_readings(loaded: Loaded, passages: Sequence[Passage], plans: Iterable[EvictionPlan]) -> list[Passage]:
    """Return the passages, each with a second reading of its prompt if a plan needs one and it has none yet.

    Raises
    ------
    UsageError
        If a prompt has images.
    ModelError
        If a layer does not attend to all keys of a prompt.
    """
    reads = [plan for plan in plans if "reconstruction" in plan.needs]
    if not reads:
        return list(passages)
    return [passage if passage.readings else _read(loaded, passage, reads[0]) for passage in passages]


@torch.inference_mode()
def _read(loaded: Loaded, passage: Passage, plan: EvictionPlan) -> Passage:
    """Return a passage with the second reading of its prompt, with the full cache."""
    if passage.images is not None:
        raise UsageError(
            f"{plan.policy.label} needs a second reading, but a prompt with images cannot be repeated as tokens",
            "Use prompts without images, or another policy.",
        )
    prompt = passage.ids[: passage.sequence.prompt].tolist()
    return replace(passage, readings=second_reading(loaded, prompt, todo="Use another policy for this model."))
