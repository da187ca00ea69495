"""Presses of kvpress in a job: what each retains of each prompt, computed once with the model before the job begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.closed_loop.job import SAME
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.trace_passages import load_model_of, passages_of
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import ClosedLoopOptions, Prefill, ReplayOptions
from kvscope.engine.runs import RunSpec
from kvscope.kernels.device import torch_device
from kvscope.model.loading import Loaded
from kvscope.policies.base import Policy
from kvscope.policies.press import Press
from kvscope.presses.choose import Chosen, chosen_by
from kvscope.trace.reader import Trace


def with_choices(
    model: CausalModel, passages: Sequence[Passage], runs: Sequence[RunSpec], prefill: Prefill
) -> list[RunSpec]:
    """Return the runs; those of presses with what they retain of each prompt under each budget.

    One pass of the model for each press, budget and prompt. With full prefill it is the pass of every run, in which
    nothing is evicted, so that the open loop, the closed loop and decoding follow the same choice.

    Raises
    ------
    UsageError
        If kvpress is not installed; if a press is unknown, cannot be followed, or refuses a prompt.
    ModelError
        If a press cannot be put into the model, or the model's losses differ from the recorded ones.
    """
    found: dict[Policy, Press] = {}
    for run in runs:
        policy = run.plan.policy
        if isinstance(policy, Press) and policy.choices is None and policy not in found:
            of_press = [each for each in runs if each.plan.policy == policy]
            found[policy] = _chosen(model, passages, policy, of_press, prefill)
    return [replace(run, plan=replace(run.plan, policy=found.get(run.plan.policy, run.plan.policy))) for run in runs]


def followed(trace: Trace, runs: Sequence[RunSpec], options: ReplayOptions) -> tuple[list[RunSpec], Loaded]:
    """Return open runs, those of presses with what they retain, and the model of the trace, which was loaded for that.

    Raises as `load_model_of` and `with_choices`.
    """
    how = options.closed or ClosedLoopOptions()
    loaded = load_model_of(trace, how, str(torch_device(options.device)), "a press of kvpress")
    with torch.no_grad():
        return with_choices(loaded.model, passages_of(trace, loaded), runs, options.prefill), loaded


def _chosen(
    model: CausalModel, passages: Sequence[Passage], press: Press, runs: Sequence[RunSpec], prefill: Prefill
) -> Press:
    choices: dict[tuple[int, int], dict[int, Tensor]] = {}
    for passage in passages:
        if passage.images is not None:
            raise UsageError(
                f"{press.label} cannot be followed in a prompt with images",
                "Use prompts without images, or policies of kvscope.",
            )
        sequence = passage.sequence
        prompt = passage.ids[: sequence.prompt]
        for run in runs:
            budget = None if run.budget is None else run.keys(sequence, prefill)
            key = (sequence.index, budget or 0)
            if key not in choices:
                chosen = chosen_by(model, prompt, press.call, budget)
                _require_same_model(model, passage, chosen)
                choices[key] = chosen.kept
    return replace(press, choices=choices)


def _require_same_model(model: CausalModel, passage: Passage, chosen: Chosen) -> None:
    """Raise ModelError if the loss of the token after the prompt differs from the recorded one."""
    prompt = passage.sequence.prompt
    if passage.logprob is None or prompt >= len(passage.ids):
        return
    losses = torch.log_softmax(chosen.logits.double(), -1)
    difference = abs(float(losses[passage.ids[prompt]]) - float(passage.logprob[prompt]))
    if difference > 10 * SAME[model.dtype]:  # of one token; SAME is for the mean over many
        raise ModelError(
            f"the model's loss after the prompt differs from that in the trace by {difference:.3g} nats",
            "Give the model that was traced with --model, and its --dtype.",
        )
