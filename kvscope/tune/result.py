"""What a search of parameters found, and the file that a policy reads it from."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kvscope.policies.base import Policy
from kvscope.policies.tuned import Tuned
from kvscope.results.statistics import Paired


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes
    ----------
    policy : Tuned
        The choice for each layer or head.
    best : Policy
        The best single setting on the sequences that were searched.
    hindsight : Policy
        The best single setting on the held-out sequences, which nobody could know.
    searched, held_out : dict of str to list of float
        For ``tuned``, ``best`` and (held out) ``hindsight``, the metric of each sequence.
    gain : Paired
        ``tuned`` against ``best`` over the held-out sequences; its difference is positive where tuning helps.
    about : dict
        Metric, budget, prefill, sequences: what was tuned on.
    """

    policy: Tuned
    best: Policy
    hindsight: Policy
    searched: dict[str, list[float]]
    held_out: dict[str, list[float]]
    gain: Paired
    about: dict[str, Any]


def to_toml(tuning: Tuning) -> str:
    """Return the file that ``--policy NAME:@FILE`` reads."""

    def value(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False)  # numbers, text, booleans and lists are written as in JSON

    gain = tuning.gain
    lines = ["# Written by kvscope tune; read with --policy NAME:@FILE", ""]
    lines += [f"{name} = {value(item)}" for name, item in tuning.about.items()]
    lines += ["", f"layers = {list(tuning.policy.layers)}"]
    lines += ["# For each of them the number of its setting, or those of its key/value heads."]
    lines += ["choice = [", *(f"  {list(row)}," for row in tuning.policy.choice), "]", "", "[held_out]"]
    lines += [f"{name} = {float(np.mean(values))}" for name, values in tuning.held_out.items()]
    lines += [f"gain = {gain.difference}", f"p = {gain.p}"]
    if gain.low is not None and gain.high is not None:
        lines += [f"gain_low = {gain.low}", f"gain_high = {gain.high}"]
    for number, policy in enumerate(tuning.policy.settings):
        usual = {item.name: item.default for item in fields(policy)}
        own = {
            name: item
            for name, item in policy.parameters().items()
            if item != usual[name] or (name in tuning.about["parameters"] and item is not None)
        }
        lines += ["", f"[[settings]]  # {number}", *(f"{name} = {value(item)}" for name, item in own.items())]
    return "\n".join(lines) + "\n"
