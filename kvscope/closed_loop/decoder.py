"""Decoding, token by token, with a cache from which keys are physically removed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kvscope.closed_loop.cache_changes import CacheChanges
from kvscope.closed_loop.decoded_rows import at_cache_position, attends_elsewhere, beyond, exact_dtype, signal, weights
from kvscope.closed_loop.gates import margins, scores
from kvscope.closed_loop.like_layers import LikeLayers
from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.closed_loop.prompt_pass import PromptPass
from kvscope.core.model_types import CausalModel, KeyValueCache
from kvscope.core.progress import Progress
from kvscope.engine.plan import GATE, SCORER
from kvscope.engine.signal_axes import per_token, time_axis
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.model.short_cache import HeldKeys, ShortLayer

BLOCK_BYTES = 128 * 2**20  # limit for the rows of the prompt that are computed at a time


class Decoder:
    """Decodes one text under one or several budgets: `simulations` decide, and `cache` holds what is not evicted.

    The budgets are the entries of one batch, `ids` ``[R, T]``. They share the prompt, which with full prefill goes
    through the model once; the tokens after it may differ.

    Layers with the same heads are stepped together, row by row in torch: not by the compiled kernels of the closed
    loop, which decoding is to prove. A token costs a fixed number of operations for each layer, whatever the number of
    heads. Nothing is read from the device before the end, unless the policy evicts without a budget: then only the
    device can tell how many keys it retains.

    `beside` is what the model reads of the prompt's images; `read` is filled in, or followed; see `CacheChanges` too.
    """

    def __init__(
        self,
        model: CausalModel,
        ids: Tensor,
        simulations: Sequence[CacheSimulation],
        cache: KeyValueCache,
        layers: Mapping[int, ShortLayer],
        beside: Mapping[str, Tensor],
        shared: Mapping[int, int],
        given: ModelSignals,
        read: PromptPass | None = None,
        changes: CacheChanges = CacheChanges(),  # noqa: B008  frozen
    ) -> None:
        self.model, self.ids, self.cache, self.layers = model, ids, cache, layers
        self.exact, self._beside, self._read = exact_dtype(model), beside, read
        self._parts = [LikeLayers(simulation, sums=changes.merge is not None) for simulation in simulations]
        self._part_of = {layer: part for part in self._parts for layer in part.simulation.shape.layers}
        self._given = given
        self._shared = shared  # layer that reads the cache of an earlier one -> that layer, whose rows decide
        self.held: list[int] = []
        self._inputs = simulations[0].inputs
        self._writers = changes.writers(layers, self._read_at_once, self.exact)
        traits = self._inputs.plan.policy.traits
        self._known = traits.counted or traits.phase == "none"  # whether budgets tell how many keys are held
        self._group_of: dict[int, tuple[HeldKeys, int]] = {}  # layer -> its group, and its place in it
        self._longest: list[Tensor] = []  # [] each: keys that the fullest head holds after a decoded step
        self._calls: list[Call] = []  # the calls of the prompt, one for each layer
        self._hidden: dict[int, list[Tensor]] = {}  # inputs of each layer so far, for gates

    def run(self, progress: Progress | None = None) -> Tensor:
        """Return the logits ``[T, V]`` of a single budget.

        Raises ReplayError if a policy retains a key that is not in the cache.
        """
        prompt = self._read_at_once
        logits = [self._read_prompt()] if prompt else []
        with replace_attention(self.model, self._attend, inputs=self._inputs.plan.reads_inputs):
            logits += [self._step(t, progress) for t in range(prompt, self.ids.shape[1])]
        self._check()
        self.held = [prompt] * (prompt - 1) + torch.stack(self._longest).tolist()
        return torch.cat(logits, 1)[0].to(self.exact)

    def generate(self, stops: Collection[int], progress: Progress | None = None) -> list[list[int]]:
        """Return the tokens that the model generates greedily after the prompt under each budget.

        There are as many as `ids` has room for. The room in `ids` after the prompt is filled in. A token of `stops`
        ends the text, and is not returned; the model goes on until the texts of all budgets have ended.

        Raises
        ------
        ReplayError
            If a policy retains a key that is not in the cache.
        """
        prompt, room = self._inputs.shape.prompt, self.ids.shape[1]
        logits = self._read_prompt() if self._read_at_once else torch.empty(0)
        made: list[list[int]] = [[] for _ in self._inputs.budgets]
        ended = [False] * len(made)
        with replace_attention(self.model, self._attend, inputs=self._inputs.plan.reads_inputs):
            for t in range(self._read_at_once, prompt):
                logits = self._step(t, progress)
            for t in range(prompt, room):
                chosen = logits[:, -1].argmax(-1).expand(len(made))
                for run, token in enumerate(chosen.tolist()):
                    ended[run] = ended[run] or token in stops
                    if not ended[run]:
                        made[run].append(token)
                if all(ended):
                    break
                self.ids[:, t] = chosen
                if t + 1 < room:  # what would follow the last token is not asked for
                    logits = self._step(t, progress)
        self._check()
        return made

    @property
    def _read_at_once(self) -> int:
        """How many tokens go through one pass, before the others are decoded."""
        inputs = self._inputs
        return inputs.shape.prompt if inputs.prefill == "full" else 0

    def _read_prompt(self) -> Tensor:
        """Run the model over the prompt, let the policy evict at its end, and return the logits ``[1, P, V]``."""
        prompt, read = self._read_at_once, self._read
        if read is not None and read.logits is not None:
            for call in read.calls:
                self.cache.update(*read.came[call.layer], call.layer)
                self._record_signals(call)
                self._calls.append(call)
            logits = read.logits
        else:
            with replace_attention(self.model, self._prefill, inputs=self._inputs.plan.reads_inputs):
                logits = self._forward(self.ids[:1, :prompt], self._beside)
            if read is not None and not self._beside and all(type(each) is ShortLayer for each in self.cache.layers):
                read.logits, read.calls = logits, list(self._calls)
                read.came = {call.layer: self.layers[call.layer].newest for call in self._calls}
        self._observe_prompt(prompt)
        return logits

    def _step(self, t: int, progress: Progress | None = None) -> Tensor:
        """Decode the tokens at a position, let the policy evict, and return the logits ``[R, 1, V]``."""
        if not self._group_of:
            self._group_layers()
        steps = [part.simulation.see(t) for part in self._parts]
        self._append(t, t + 1)
        for part in self._parts:
            part.row = self._zeros(part, 1, t + 1)[:, :, 0].repeat(part.runs, 1, 1, 1)
        logits = self._forward(self.ids[:, t : t + 1])
        for part, step in zip(self._parts, steps, strict=True):
            part.complete(step, part.row)
        self._cut(t)
        if progress is not None:
            read = self._read_at_once
            progress((t + 1 - read) / (self.ids.shape[1] - read))
        return logits

    def _check(self) -> None:
        """Raise ReplayError if a key was to be retained that is not in the cache."""
        for part in self._parts:
            for _, group, _ in part.groups:
                group.check()

    def _forward(self, ids: Tensor, beside: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **beside)
        return output.logits  # type: ignore[no-any-return]

    def _prefill(self, call: Call, kernel: Kernel) -> Tensor:
        """Store a layer's call for the whole prompt, and return the output of the model's own kernel."""
        if call.layer in self._shared:
            return kernel()
        self._record_signals(call)
        self._calls.append(call)
        return kernel()

    def _observe_prompt(self, prompt: int) -> None:
        """Let the policy observe every row of the prompt, then cut the cache to the keys that it holds."""
        for part in self._parts:
            self._observe_part(part, prompt)
        self._calls.clear()
        for layer in self.layers.values():
            layer.repeat(len(self.ids))
        self._group_layers()
        self._append(0, prompt)
        self._cut(prompt - 1)

    def _observe_part(self, part: LikeLayers, prompt: int) -> None:
        """Let the policy observe every row of the prompt in some layers."""
        size = max(1, BLOCK_BYTES // self._zeros(part, 1, prompt).nbytes)
        for start in range(0, prompt, size):
            stop = min(start + size, prompt)
            rows = self._zeros(part, stop - start, stop)
            for call in (call for call in self._calls if self._part_of[call.layer] is part):
                query = call.query[0, :, start:stop]  # [H, b, D]
                queries = query.view(call.key.shape[1], -1, *query.shape[1:])  # [G, Q, b, D]
                hidden = beyond(start, stop, call, queries.device)
                made = weights(call, queries, call.key[0, :, None, :stop], hidden, heads=0)
                rows[part.place(call.layer)] = made.flatten(0, 1)
            for t in range(start, stop):
                part.complete(part.simulation.see(t), rows[:, :, t - start, : t + 1])

    def _append(self, start: int, stop: int) -> None:
        """Note that the next call of every layer adds the tokens `start` to `stop` - 1 to its cache."""
        for part in self._parts:
            for _, group, _ in part.groups:
                group.append(start, stop)

    def _zeros(self, part: LikeLayers, queries: int, keys: int) -> Tensor:
        """Return empty rows ``[L, H, b, n]``."""
        shape = part.simulation.shape
        size = (len(shape.layers), shape.heads, queries, keys)
        return torch.zeros(size, dtype=self.exact, device=self.ids.device)

    def _group_layers(self) -> None:
        """Group the layers by how many keys they have room for; the budgets are known from now on."""
        for part in self._parts:
            shape = part.simulation.shape
            for caches in part.simulation.occupancy.equal:
                numbers = [shape.layers[place] for place in caches.layers]
                layers = [self.layers[number] for number in numbers]
                group = HeldKeys(layers, shape.kv_heads, self.ids.device, part.runs)
                part.groups.append((caches, group, torch.tensor(caches.layers, device=self.ids.device)))
                self._group_of |= {number: (group, place) for place, number in enumerate(numbers)}

    def _attend(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the attention output of the newest queries over the keys in their layer's cache; store their rows."""
        owner = self._shared.get(call.layer, call.layer)
        layer = self._record_signals(call) if owner == call.layer else self._owner_of(call, owner)
        group, place = self._group_of[owner]
        part = self._part_of[owner]
        entries = (part.runs, part.simulation.shape.kv_heads, -1)
        positions, there = group.positions[place].view(entries), group.there[place].view(entries)  # [R, G, n]
        query = part.by_kv_head(call.query[:, :, 0])  # [R, G, Q, D]
        if layer.rotary is not None:
            query = at_cache_position(layer, query, there.sum(-1) - 1)
        row = weights(call, query, call.key, ~there[:, :, None], heads=1)  # [R, G, Q, n]
        if owner == call.layer:
            # padding adds nothing to the weight of the first key
            index = positions.clamp(min=0)[:, :, None].expand(row.shape)
            part.by_kv_head(part.row[:, part.place(owner)]).scatter_add_(-1, index, row)
        values = call.value.to(self.exact).masked_fill(~there[..., None], 0)
        return (row @ values).flatten(1, 2)[:, None].to(call.query.dtype)  # [R, 1, H, D]

    def _owner_of(self, call: Call, owner: int) -> ShortLayer:
        """Return the cache that a layer reads and another owns; raises ModelError if it attends to something else."""
        layer = self.layers[owner]
        if call.key.shape[2] != layer.longest() or call.key.shape[1] != self._part_of[owner].simulation.shape.kv_heads:
            raise attends_elsewhere(self.model, call)
        return layer

    def _record_signals(self, call: Call) -> ShortLayer:
        """Write the signals of a call's new tokens to the simulation, and return the cache of the layer."""
        layer = self.layers[call.layer]
        queries, keys = call.query.shape[2], call.key.shape[2]
        part = self._part_of[call.layer]
        size = (len(call.query), part.simulation.shape.kv_heads, queries)
        latent = bool(layer.newest) and layer.newest[0].shape[1] == 1 < size[1]
        came = (call.key[:, :, -queries:], call.value[:, :, -queries:]) if latent else layer.newest
        if not came or any(part.shape[:3] != size for part in came) or keys != layer.longest():
            raise attends_elsewhere(self.model, call)
        key, value = (part.to(self.exact) for part in came)
        if self._inputs.plan.gates and call.hidden is not None:
            self._hidden.setdefault(call.layer, []).append(call.hidden.expand(len(self.ids), -1, -1))
        for name, buffer in per_token(part.simulation.inputs.signals).items():
            start = layer.seen - queries
            if name == "token_kinds":
                fresh = self._given.kinds_at(part.simulation.shape.sequence, start, self.ids[:, start : layer.seen])
            elif name.startswith(GATE):
                fresh = self._margins(name.removeprefix(GATE), call)[..., -queries:]
            elif name.startswith(SCORER):
                fresh = scores(name.removeprefix(SCORER), call).expand(len(self.ids), -1, -1)
            else:
                fresh = signal(name, call.query.to(self.exact), key, value, self._given, call.layer)
            buffer[:, part.place(call.layer)].narrow(time_axis(name), start, queries).copy_(fresh)
        return layer

    def _margins(self, gate: str, call: Call) -> Tensor:
        """Return the margins of a gate for all tokens so far, ``[R, G, n]``; it needs every past input of the layer."""
        inputs = self._hidden.get(call.layer)
        return margins(gate, call, torch.cat(inputs, 1) if inputs else None, self._inputs.shape.prompt)

    def _cut(self, t: int) -> None:
        """Remove what is evicted after step `t` and what the next query cannot see; merge before, quantise after."""
        longest = []
        for writer in self._writers:
            writer.before(t, self._parts)
        for part in self._parts:
            retained = part.simulation.held(t, t + 1)[:, :, :, 0].transpose(0, 1).flatten(1, 2)  # [L, R * G, t + 1]
            for caches, group, layers in part.groups:
                most = part.simulation.occupancy.most_of(caches) if self._known else None
                oldest = t + 2 - caches.within(t + 2) if caches.window or caches.chunk else 0
                if most is not None and oldest > 0:
                    most = min(most, caches.within(t + 2) - 1)
                longest.append(group.cut(retained.index_select(0, layers), most, oldest))
        self._longest.append(torch.stack(longest).max())
        for writer in self._writers:
            writer.after(t + 1, self._parts)
