"""When a key was last attended to, step by step and in a number of operations that does not depend on the steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvscope.kernels import device as devices
from kvscope.metrics.past import Past
from tests.engine.maps import attention


def reference(row: list[list[float]]) -> list[list[int]]:
    """Return for every step and key the last step before at which its weight was above 1/n, or its own position.

    Weights are compared in their own type: one that is 1/n rounded is not above it.
    """
    found = []
    for t in range(len(row)):
        last = []
        for key in range(len(row)):
            steps = [step for step in range(key, t) if row[step][key] > float(np.float32(1 / (step + 1)))]
            last.append(steps[-1] if steps else key)
        found.append(last)
    return found


@pytest.mark.parametrize("block", [1, 4, 7, 30])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", ["half", "equal"])
def test_last_attended(block: int, on_cpu: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda device: on_cpu)
    length = 24
    if kind == "half":
        rows = attention(3, 2, 2, length, "half").float()
    else:  # every weight is 1/n exactly: none is above it
        rows = torch.ones(2, 2, length, length).tril() / torch.arange(1, length + 1)[:, None]
    past = Past(["last_attended"], 5)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        made = past.add(rows[..., start:stop, :stop], start)["last_attended"]
        assert made.dtype == torch.int32
        parts += list(made.unbind(-2))
    for layer in range(2):
        for head in range(2):
            expected = reference(rows[layer, head].tolist())
            for t, part in enumerate(parts):
                assert part[layer, head].tolist()[: t + 1] == expected[t][: t + 1]
