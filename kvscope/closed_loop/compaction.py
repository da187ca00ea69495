"""Attention with compacted positions: at every step the keys of a shortened cache are renumbered from 0.

As in StreamingLLM's code, keys are stored without rotation, and each gets the position that it has in the cache, oldest
first; the query gets the last one. A live row is then no longer a part of the full row, so it is computed step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.simulation import CacheSimulation
from kvscope.kernels import device as devices
from kvscope.model.attention_hook import Call
from kvscope.model.derotation import Derotation
from kvscope.policies.base import Step


class Compacted:
    """One layer's attention at compacted positions; its vectors are derotated once for all blocks of queries.

    Parameters
    ----------
    call : Call
        The attention call of the layer; its batch axis is the runs.
    rotary : Derotation
        Rotation of the layer.
    """

    def __init__(self, call: Call, rotary: Derotation) -> None:
        self.call, self.rotary = call, rotary
        positions = torch.arange(call.query.shape[2], device=call.query.device)
        self.query = rotary.off(call.query, positions)  # [R, H, T, D]
        self.key = rotary.off(call.key, positions)  # [R, G, T, D]
        self.value = call.value.to(call.exact)

    def attend(self, simulation: CacheSimulation, rows: Tensor, start: int) -> Tensor:
        """Step a simulation through a block of queries, and return their output ``[R, b, H, D]``.

        Parameters
        ----------
        simulation : CacheSimulation
            The caches of this layer.
        rows : Tensor
            Full rows of the block ``[R, H, b, stop]``, computed at the original positions.
        start : int
            First query of the block.
        """
        outputs = []
        for t in range(start, start + rows.shape[2]):
            step = simulation.see(t)
            row = rows[:, :, t - start, : t + 1]
            if simulation.occupancy.evicted:
                row, output = self._shortened(simulation, step, row)
            else:
                output = self._whole(t, row)
            simulation.attend(step, row[:, None])
            outputs.append(output.flatten(1, 2))  # [R, H, D]
        return torch.stack(outputs, 1)

    def follow(self, simulation: CacheSimulation, start: int, stop: int) -> Tensor:
        """Return the output of queries `start` to `stop` - 1, ``[R, b, H, D]``, over what a finished simulation holds.

        The cache is another layer's, which has decided which keys it holds.
        """
        outputs = []
        for t in range(start, stop):
            visible = simulation.visible(t, t + 1)[:, 0, :, 0]  # [R, G, n]
            count = visible.sum(-1)
            most = int(count.max()) if devices.on_cpu(count.device) else t + 1
            outputs.append(self._live(t, visible, count, most)[1].flatten(1, 2))
        return torch.stack(outputs, 1)

    def _whole(self, t: int, row: Tensor) -> Tensor:
        """Return the output of the full row of query `t`, ``[R, G, Q, D]``: without evictions no position changes."""
        grouped = row.reshape(row.shape[0], self.key.shape[1], -1, t + 1)
        return grouped @ self.value[:, :, : t + 1]

    def _shortened(self, simulation: CacheSimulation, step: Step, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the live row of a step and its output; the full row if nothing has been evicted in any run."""
        visible = step.visible[:, 0].expand(-1, self.key.shape[1], -1)  # [R, G, n]
        count = visible.sum(-1)  # [R, G]
        live, of_live = self._live(step.t, visible, count, most_keys(step, count))
        lost = (1 - live.sum(-1)).clamp(min=0)
        missing = simulation.inputs.missing_mass
        if not simulation.plan.policy.traits.counted:  # only the device can tell whether it evicts
            whole = visible.all()
            of_live = torch.where(whole, self._whole(step.t, row), of_live)
            live = torch.where(whole, row, live)
            lost = lost if missing is None else torch.where(whole, missing[:, 0, :, step.t], lost)
        if missing is not None:
            missing[:, 0, :, step.t] = lost
        return live, of_live

    def _live(self, t: int, visible: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the live row ``[R, H, n]`` of a query over its visible keys, and its output ``[R, G, Q, D]``.

        `count` are the visible keys of each head, ``[R, G]``, and `most` is at least the largest of them.
        """
        runs, _, n = visible.shape
        index = _visible_keys(visible, most)[..., None]  # [R, G, m, 1]
        compacted = torch.arange(most, device=index.device)
        keys = self.rotary.on(self.key.gather(2, index.expand(-1, -1, -1, self.key.shape[-1])), compacted)
        query = self._newest(t, count - 1)
        logits = query @ keys.to(query.dtype).transpose(2, 3) * self.call.scaling  # [R, G, Q, m]
        if self.call.softcap is not None:
            logits = (logits / self.call.softcap).tanh() * self.call.softcap
        logits = logits.masked_fill((compacted >= count[..., None])[:, :, None], -torch.inf)
        live = self._softmax(logits)
        output = live @ self.value.gather(2, index.expand(-1, -1, -1, self.value.shape[-1]))
        row = live.new_zeros(*live.shape[:3], n)
        row.scatter_add_(-1, index[..., 0][:, :, None].expand(live.shape), live)
        return row.reshape(runs, -1, n), output

    def _newest(self, t: int, position: Tensor) -> Tensor:
        """Return query `t`, ``[R, G, Q, D]``, rotated to its position in each cache, ``[R, G]``."""
        query = self.query[:, :, t]
        _, heads, size = query.shape
        flat = query.reshape(position.numel(), -1, size).transpose(0, 1)[None]  # [1, Q, R * G, D]
        rotated = self.rotary.on(flat, position.flatten()).to(self.call.exact)
        return rotated[0].transpose(0, 1).reshape(*position.shape, heads // position.shape[1], size)

    def _softmax(self, logits: Tensor) -> Tensor:
        if self.call.sinks is None:
            return torch.softmax(logits, -1)
        runs, groups = logits.shape[:2]
        sink = self.call.sinks.to(logits.dtype).view(1, groups, -1, 1).expand(runs, -1, -1, 1)
        return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]


def most_keys(step: Step, count: Tensor) -> int:
    """Return how many keys the head that sees most of them sees, of `count` ``[R, G]``; on a GPU a bound on it.

    A GPU would have to be waited for. On a CPU the number is exact, because a longer row is added in another order, in
    which the last digit of a sum may differ.
    """
    return int(count.max()) if devices.on_cpu(count.device) else step.most_visible


def _visible_keys(visible: Tensor, most: int) -> Tensor:
    """Return the original position of the i-th visible key, ``[R, G, most]``; 0 where there are fewer keys."""
    n = visible.shape[-1]
    compacted = torch.where(visible, visible.cumsum(-1) - 1, most)
    index = torch.zeros(*visible.shape[:2], most + 1, dtype=torch.int64, device=visible.device)
    index.scatter_(-1, compacted, torch.arange(n, device=visible.device).expand(compacted.shape))
    return index[..., :most]
