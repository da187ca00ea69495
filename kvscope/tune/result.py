"""The result of a parameter search, and the file that a policy reads it from."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, fields

import numpy as np

from kvscope.core.seal import SEAL, seal_of
from kvscope.policies.base import Policy
from kvscope.policies.tuned import Tuned
from kvscope.results.statistics import Paired


@dataclass(frozen=True)
class Tuning:
    """The result of a parameter search.

    Attributes
    ----------
    policy : Tuned
        The policy with the chosen setting of each layer or head.
    best : Policy
        The best single setting on the searched sequences.
    hindsight : Policy
        The best single setting on the held-out sequences; a search cannot know it.
    searched, held_out : dict of str to list of float
        The metric of each sequence for ``tuned`` and ``best``, and if held out also for ``hindsight``.
    gain : Paired
        ``tuned`` compared with ``best`` on the held-out sequences; the difference is positive if tuning helps.
    about : dict
        The conditions of the search: policy, parameters, metric, budget, prefill, traces.
    """

    policy: Tuned
    best: Policy
    hindsight: Policy
    searched: dict[str, list[float]]
    held_out: dict[str, list[float]]
    gain: Paired
    about: dict[str, object]


def to_toml(tuning: Tuning) -> str:
    """Return the content of the file that ``--policy NAME:@FILE`` reads."""

    def value(item: object) -> str:
        return json.dumps(item, ensure_ascii=False)  # TOML has the syntax of JSON for all values that occur here

    gain, searched = tuning.gain, tuning.about["parameters"]
    assert isinstance(searched, list), "names of parameters"
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
        defaults = {item.name: item.default for item in fields(policy)}
        written = {
            name: item
            for name, item in policy.parameters().items()
            if item != defaults[name] or (name in searched and item is not None)
        }
        lines += ["", f"[[settings]]  # {number}", *(f"{name} = {value(item)}" for name, item in written.items())]
    text = "\n".join(lines) + "\n"
    first, rest = text.split("\n", 1)
    return f"{first}\n{SEAL} = {value(seal_of(tomllib.loads(text)))}\n{rest}"
