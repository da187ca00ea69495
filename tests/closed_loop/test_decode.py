"""Decoding with a physically shortened cache, compared with plain forward passes of the model.

Silent failures that would make it a proof of nothing: a cache that is only masked, keys of another head or position,
a signal filled in at the wrong step, decisions other than the policy's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from kvscope.closed_loop.decode import Decoded, decode
from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.core.errors import ModelError, ReplayError, UsageError
from kvscope.core.options import ModelSource
from kvscope.core.residency import NEVER
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.loading import load
from kvscope.model.short_cache import HeldKeys, ShortLayer
from kvscope.policies import POLICIES
from kvscope.policies.base import Policy, Step
from kvscope.policies.spec import parse_policies
from tests.model import tiny
from tests.reference import replay as twin

PROMPT, LENGTH, BUDGET = 11, 26, 8
EXACT = 1e-9
# Models whose softmax is in float32 with every dtype, or whose experts have no float64.
COARSE = {"gemma2": 1e-5, "gpt_oss": 1e-5}
ROTATED = ["llama", "llama-yarn", "qwen3", "gemma3", "gpt_neox", "phi3", "phi3-partial", "gpt_oss"]
SIZES: dict[str, Any] = {**tiny._GROUPED, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MORE: dict[str, Callable[[], Any]] = {
    "llama-yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN)),
    "phi3-partial": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, rope_parameters=HALF)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
}


def model(name: str, layers: int = 2) -> Any:
    """Return a tiny model in float64 (gpt_oss: float32), with two layers or one of the kind of the second."""
    return _made(name, layers)


@cache
def _made(name: str, layers: int) -> Any:
    torch.manual_seed(0)
    if name == "demo":
        return load(ModelSource("demo")).model.double()
    made = tiny.build(name) if name in tiny.MODELS else MORE[name]().eval()
    if layers == 1:
        config = made.config
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[-1:]
        made = type(made)(config).eval()
    return made if name == "gpt_oss" else made.double()


def text(name: str = "llama") -> Tensor:
    if name == "demo":
        return torch.randint(1, 1024, (100,), generator=torch.Generator().manual_seed(3))
    return tiny.tokens(LENGTH)[0]


def plan(spec: str) -> EvictionPlan:
    """Return the published plan of a policy, with a phase that evicts often enough in these short texts."""
    policy = parse_policies([spec])[0]
    return EvictionPlan.make(policy, "every:4") if policy.phase.startswith("every") else EvictionPlan.published(policy)


@torch.no_grad()
def forward(name: str, ids: Tensor, layers: int = 2, **given: Any) -> Tensor:
    return model(name, layers)(input_ids=ids[None], use_cache=False, **given).logits[0]


def far(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("name", [*tiny.MODELS, "llama-yarn", "phi3-partial", "demo"])
def test_with_a_budget_for_all_keys_it_is_the_plain_model(name: str, prefill: str, positions: str) -> None:
    if positions == "compacted" and name in ("gpt2", "opt", "mistral", "gemma2", "gemma3"):
        return  # no rotary embedding, or windows, in which positions in cache and text differ
    ids = text(name)
    found = decode(model(name), ids, plan("h2o"), len(ids), prompt=PROMPT, prefill=prefill, positions=positions)
    assert far(found.logits, forward(name, ids)) < COARSE.get(name, EXACT)
    windows = {"mistral": [0, 1], "gemma2": [0], "gemma3": [0], "gpt_oss": [0]}.get(name, [])
    assert all((leave == NEVER).all() for layer, leave in enumerate(found.leave) if layer not in windows)
    assert found.held[-1] == (tiny.WINDOW if name == "mistral" else len(ids))


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "phi3-partial", "demo"])
def test_the_newest_keys_are_a_banded_mask(name: str, prefill: str) -> None:
    ids = text(name)
    found = decode(model(name), ids, plan("window"), BUDGET, prompt=PROMPT, prefill=prefill)
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    causal = key <= query
    whole = query < (PROMPT if prefill == "full" else 0)
    mask = (causal & (whole | (key >= query - BUDGET)))[None, None]  # the band and the query's key
    if name == "gemma3":
        near = mask & (key > query - tiny.WINDOW)
        mask = {"full_attention": mask, "sliding_attention": near}
    banded = forward(name, ids, attention_mask=mask)
    assert far(found.logits, banded) < EXACT
    assert far(banded, forward(name, ids)) > 1e-3  # the mask has an effect


@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("name", ROTATED)
def test_one_layer_is_the_plain_model_on_the_remaining_tokens(name: str, positions: str) -> None:
    """A key of the first layer depends on its token alone, so a model that gets only those tokens must agree."""
    ids = text(name)
    found = decode(model(name, 1), ids, plan("streaming-llm:sinks=2"), BUDGET, prompt=PROMPT, positions=positions)
    moved = 0.0
    for t in range(PROMPT, LENGTH):
        left = torch.tensor([*range(2), *range(t - BUDGET + 2, t + 1)])
        places = torch.arange(len(left)) if positions == "compacted" else left
        whole = torch.ones(1, len(left), dtype=torch.long)  # positions with gaps are not several texts
        alone = forward(name, ids[left], 1, position_ids=places[None], attention_mask=whole)[-1]
        assert far(found.logits[t], alone) < COARSE.get(name, EXACT)
        other = left if positions == "compacted" else torch.arange(len(left))
        elsewhere = forward(name, ids[left], 1, position_ids=other[None], attention_mask=whole)[-1]
        moved = max(moved, far(alone, elsewhere))
    assert moved > 1e-4  # the positions of the keys have an effect


def masked(name: str, ids: Tensor, leave: list[Tensor]) -> tuple[Tensor, list[Call]]:
    """Return logits and attention calls of a plain pass with the mask of the eviction steps `leave` in every layer."""
    used, calls = model(name), list[Call]()
    step, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    hooks = []
    for module in used.modules():
        if type(module).__name__.endswith("Attention"):
            gone = leave[module.layer_idx][:, None]  # [G, 1, T]
            mask = ((key <= step) & (gone >= step))[None]  # [1, G, T, T]
            mask = mask.repeat_interleave(used.config.num_attention_heads // mask.shape[1], 1)

            def replaced(_: Any, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
                assert kwargs["attention_mask"] is None or kwargs["attention_mask"].dtype == torch.bool
                return args, {**kwargs, "attention_mask": mask}

            hooks.append(module.register_forward_pre_hook(replaced, with_kwargs=True))
    with observe_attention(used, calls.append):
        logits = forward(name, ids)
    for hook in hooks:
        hook.remove()
    return logits, calls


SIGNALS: dict[str, Callable[[Call], Tensor]] = {
    "keys": lambda call: call.key[0],
    "values": lambda call: call.value[0],
    "queries": lambda call: call.query[0],
    "mean_query": lambda call: call.query[0].sum(0) / call.query.shape[1],
    "key_l2": lambda call: (call.key[0] ** 2).sum(-1).sqrt(),
    "value_l1": lambda call: call.value[0].abs().sum(-1),
    "value_l2": lambda call: (call.value[0] ** 2).sum(-1).sqrt(),
}


def own_signal(call: Call, name: str, of_model: ModelSignals) -> Tensor:
    """Return a signal of a layer; what depends on the parameters of the model is read from them."""
    if name == "rotary":
        return of_model.rotary[call.layer]
    if name == "value_out_l1":
        weight = of_model.projections[call.layer].weight
        projected = call.value[0].repeat_interleave(len(weight) // call.value.shape[1], 0) @ weight
        return projected.abs().sum(-1).unflatten(0, (call.value.shape[1], -1)).mean(1)
    return SIGNALS[name](call)


def again(made: EvictionPlan, calls: list[Call], prompt: int, prefill: str, of_model: ModelSignals) -> CacheSimulation:
    """Return a simulation of all layers over the live rows and signals of a completed masked pass."""
    shape = Shape(
        tuple(range(len(calls))),
        calls[0].query.shape[1],
        calls[0].key.shape[1],
        prompt,
        calls[0].query.shape[2],
        windows=tuple(call.sliding_window for call in calls),
    )
    given = {
        name: torch.stack([own_signal(call, name, of_model) for call in calls]) for name in made.needs - {"weights"}
    }
    simulation = CacheSimulation(made, [BUDGET], shape, prefill, given, dtype=torch.float64)
    rows = torch.stack([call.rows(0, shape.length)[0] for call in calls])
    for t in range(shape.length):
        simulation.step(t, rows[:, :, t, : t + 1])
    return simulation


def pairs() -> list[tuple[str, str, str]]:
    """Return every policy that can be decoded, on one model; and those of each kind on the others."""
    kinds = ["h2o", "tova", "ada-kv:window=4,kernel=3", "cake:window=4,kernel=3", "keydiff", "vatp", "r-kv"]
    needs_more = {"attention-gate", "dms", "q-filters", "kvzap", "kvzip", "fastgen", "belady"}  # a file, or a trace
    small = {  # that evict nothing from a short text otherwise
        "duo-attention": "duo-attention:recent=3,sinks=1,threshold=0.7",
        "simlayerkv": "simlayerkv:rows=2,recent=3,sinks=1,threshold=0.3",
    }
    names = [name for name, cls in POLICIES.items() if not cls.reads and name not in needs_more]
    chosen = [("llama", small.get(name, name)) for name in names]
    chosen += [("llama", spec) for spec in (*kinds[2:4], "roco", "tova:scope=kv_head")]
    chosen += [(name, spec) for name in ("gemma3", "gpt_neox", "qwen3") for spec in kinds]
    return [
        (name, spec, prefill)
        for name, spec in dict.fromkeys(chosen)
        for prefill in ("full", "stream")
        if prefill in plan(spec).policy.traits.prefills and (prefill == "full" or plan(spec).phase != "prefill")
    ]


def require_masked_pass(name: str, made: EvictionPlan, prefill: str) -> None:
    """Fail unless decoding equals a pass with its evictions masked, whose rows lead to the same evictions."""
    ids = text(name)
    found = decode(model(name), ids, made, BUDGET, prompt=PROMPT, prefill=prefill)
    logits, calls = masked(name, ids, found.leave)
    assert far(found.logits, logits) < EXACT
    of_model = ModelSignals.of(model(name), [made], ids[None])
    simulation = again(made, calls, PROMPT, prefill, of_model)
    for layer, leave in enumerate(found.leave):
        assert torch.equal(leave, simulation.state.leave[0, layer].expand(leave.shape)), f"layer {layer}"
    assert made.phase == "none" or any((leave != NEVER).any() for leave in found.leave)


@pytest.mark.parametrize(("name", "spec", "prefill"), pairs())
def test_it_is_a_masked_pass_with_the_decisions_from_its_rows(name: str, spec: str, prefill: str) -> None:
    require_masked_pass(name, plan(spec), prefill)


class Looks(Policy):
    """Scores a key by its value norm times its dot product with the mean query."""

    name = "looks"
    needs = frozenset({"mean_query", "keys", "value_l2"})

    def observe(self, step: Step, score: Tensor) -> Tensor:
        towards = (step.signals["keys"] * step.signals["mean_query"][:, :, None, None]).sum(-1)
        return towards * step.signals["value_l2"]


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_signals_that_only_sparse_readers_use(prefill: str) -> None:
    require_masked_pass("gemma3", EvictionPlan.published(Looks()), prefill)


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("spec", ["h2o", "tova", "a2sf:alpha=0.5"])
def test_decisions_are_those_of_the_plain_loop(spec: str, prefill: str) -> None:
    """Without the engine: sets and loops over the rows of a plain masked pass."""
    observe, recent = {"h2o": (twin.h2o, BUDGET // 2), "tova": (twin.tova, 0)}.get(spec, (twin.a2sf(0.5), 0))
    ids = text()
    found = decode(model("llama"), ids, plan(spec), BUDGET, prompt=PROMPT, prefill=prefill)
    _, calls = masked("llama", ids, found.leave)
    for call, leave in zip(calls, found.leave, strict=True):
        rows = call.rows(0, LENGTH)[0].tolist()  # live rows: evicted keys have no weight
        for head in range(2):
            shared = rows if spec == "tova" else rows[2 * head : 2 * head + 2]
            _, held = twin.replay(shared, observe, BUDGET, PROMPT, prefill, recent=recent)
            expected = [next((t for t in range(key, LENGTH) if key not in held[t]), NEVER) for key in range(LENGTH)]
            assert leave[head].tolist() == expected


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("spec", ["h2o", "tova", "random:seed=3", "key-norm"])
def test_the_first_layer_decides_as_in_an_open_loop(spec: str, prefill: str) -> None:
    """It does not depend on evictions in later layers, so full-cache rows lead to the same decisions."""
    calls: list[Call] = []
    with observe_attention(model("demo"), calls.append):
        forward("demo", text("demo"))
    found = decode(model("demo"), text("demo"), plan(spec), BUDGET, prompt=50, prefill=prefill)
    simulation = again(plan(spec), calls[:1], 50, prefill, ModelSignals())
    assert torch.equal(found.leave[0], simulation.state.leave[0, 0].expand(found.leave[0].shape))


class Lengths:
    """Records how many keys every call of every layer got from its cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[list[int]] = []
        update = ShortLayer.update

        def noted(layer: ShortLayer, *args: Any) -> tuple[Tensor, Tensor]:
            keys, values = update(layer, *args)
            assert keys.shape == values.shape
            own = [int(head.isfinite().all(-1).sum()) for head in keys[0]]
            assert max(own) == keys.shape[2]  # the returned keys are as many as the fullest head holds
            self.keys.append(own)
            return keys, values

        monkeypatch.setattr(ShortLayer, "update", noted)


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(("name", "layers"), [("llama", 2), ("demo", 4), ("gemma3", 2)])
def test_the_cache_is_physically_short(name: str, layers: int, prefill: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ids = Lengths(monkeypatch), text(name)
    found = decode(model(name), ids, plan("h2o"), BUDGET, prompt=PROMPT, prefill=prefill)
    prompt = PROMPT if prefill == "full" else 0
    assert found.held[prompt and prompt - 1 :] == [min(t + 1, BUDGET) for t in range(prompt and prompt - 1, len(ids))]
    decoded = seen.keys[layers:] if prompt else seen.keys
    assert len(decoded) == layers * (len(ids) - prompt)
    assert max(map(max, decoded)) == BUDGET + 1
    if name == "gemma3":
        assert max(map(max, decoded[::2])) == tiny.WINDOW


def test_heads_hold_different_numbers_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made = Lengths(monkeypatch), plan("ada-kv:window=4,kernel=3")
    decode(model("llama"), text(), made, BUDGET, prompt=PROMPT)
    assert any(len(set(heads)) > 1 for heads in seen.keys)


def test_compacted_positions_change_logits_but_not_decisions_without_attention() -> None:
    both = [
        decode(model("llama"), text(), plan("streaming-llm"), BUDGET, prompt=PROMPT, positions=positions)
        for positions in ("original", "compacted")
    ]
    assert far(both[0].logits[:PROMPT], both[1].logits[:PROMPT]) == 0
    assert far(both[0].logits[PROMPT:], both[1].logits[PROMPT:]) > 1e-4
    assert all(torch.equal(one, other) for one, other in zip(both[0].leave, both[1].leave, strict=True))


@pytest.mark.parametrize("spec", ["roco", "scissorhands"])
@torch.no_grad()
def test_learned_sinks_are_in_the_sum_of_a_live_row(spec: str) -> None:
    """Live rows are divided by retained mass plus the mass on the sink; without the sink they would be too large."""
    found = decode(model("gpt_oss"), text(), plan(spec), BUDGET, prompt=PROMPT, prefill="stream")
    calls: list[Call] = []
    with observe_attention(model("gpt_oss"), calls.append):
        forward("gpt_oss", text())
    rows = calls[1].rows(0, LENGTH)  # [1, H, T, T]; the first layer has a window in which the policy evicts nothing
    missing = 1 - rows.sum(-1)
    assert missing.min() > 1e-3
    decisions = []
    for lost in (missing, None):
        simulation = CacheSimulation(
            plan(spec), [BUDGET], Shape((1,), 4, 2, PROMPT, LENGTH), "stream", missing_mass=lost
        )
        for t in range(LENGTH):
            simulation.step(t, rows[:, :, t, : t + 1])
        decisions.append(simulation.state.leave[0, 0])
    assert torch.equal(found.leave[1], decisions[0])
    assert not torch.equal(*decisions)


def run(name: str = "llama", spec: str = "h2o", ids: Tensor | None = None, **given: Any) -> Decoded:
    given = {"budget": BUDGET, "prompt": PROMPT, **given}
    return decode(model(name), text() if ids is None else ids, plan(spec), given.pop("budget"), **given)


def test_a_batch_of_one_is_one_sequence() -> None:
    assert torch.equal(run(ids=text()[None]).logits, run().logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spec": "quest"}, "reads keys that a smaller cache does not hold"),
        ({"spec": "scissorhands:variant=released", "prefill": "stream"}, "observes the attention on keys"),
        ({"positions": "renamed"}, "positions 'renamed' is unknown"),
        ({"prompt": LENGTH + 1}, "cannot be decoded"),
        ({"prompt": 0}, "cannot be decoded"),
        ({"budget": 0}, "cannot be decoded"),
        ({"ids": tiny.tokens(LENGTH, batch=2)}, "cannot be decoded"),
        ({"spec": "snapkv", "prefill": "stream"}, "stream"),
    ],
)
def test_impossible_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**given)


def test_an_unknown_signal_is_refused() -> None:
    class Wants(Looks):
        needs = frozenset({"gates"})

    with pytest.raises(UsageError, match="needs a signal called 'gates'"):
        decode(model("llama"), text(), EvictionPlan.published(Wants()), BUDGET, prompt=PROMPT)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_cannot_be_compacted(name: str) -> None:
    with pytest.raises(ModelError, match="no rotary embedding that can be inverted"):
        run(name, positions="compacted")


def test_a_layer_without_rotation_cannot_be_compacted() -> None:
    assert run("smollm3").held[-1] == BUDGET
    with pytest.raises(ModelError, match="layer 1 of SmolLM3ForCausalLM does not use the rotary embedding"):
        run("smollm3", positions="compacted")


def test_layers_whose_keys_no_window_describes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model("llama").config, "layer_types", ["chunked_attention", "full_attention"], raising=False)
    with pytest.raises(ModelError, match="chunked_attention layers, in which a query does not see all"):
        run("llama")


def test_a_layer_that_reads_another_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    update = ShortLayer.update

    def twice(layer: ShortLayer, *args: Any) -> tuple[Tensor, Tensor]:
        keys, values = update(layer, *args)
        return torch.cat([keys, keys], 2), torch.cat([values, values], 2)

    monkeypatch.setattr(ShortLayer, "update", twice)
    with pytest.raises(ModelError, match="layer 0 of LlamaForCausalLM does not attend to the keys and values it"):
        run(prefill="stream")


def test_a_latent_vector_is_held_as_long_as_a_head_holds_its_key() -> None:
    layer = ShortLayer()
    held = HeldKeys([layer], 2, torch.device("cpu"))
    held.append(0, 4)
    layer.update(torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 2))
    longest = held.cut(torch.tensor([[[True, False, False, True], [False, False, True, True]]]), 2)
    assert longest == 2 and layer.longest() == 3
    assert held.positions.tolist() == [[[0, 2, 3], [0, 2, 3]]]
    assert held.there.tolist() == [[[True, False, True], [False, True, True]]]
    held.append(4, 5)
    keys, values = layer.update(torch.randn(1, 1, 1, 3), torch.randn(1, 1, 1, 2))
    assert keys.shape == (1, 1, 4, 3) and values.shape == (1, 1, 4, 2)
    held.cut(torch.tensor([[[True, False, False, True, True], [False, False, False, True, True]]]), 3)
    assert held.positions.tolist() == [[[0, 3, 4], [0, 3, 4]]]
    held.check()
    held.cut(torch.ones(1, 2, 5, dtype=torch.bool), 4)
    with pytest.raises(ReplayError, match="retains a key that is already evicted"):
        held.check()


def test_each_entry_of_a_batch_holds_latent_vectors_of_its_own() -> None:
    """Two budgets, two heads each: a vector that a head of one budget holds is not held for the other."""
    layer = ShortLayer()
    held = HeldKeys([layer], 2, torch.device("cpu"), runs=2)
    held.append(0, 3)
    layer.update(torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 2))
    no, yes = [False, False, False], [True, False, True]
    held.cut(torch.tensor([[yes, no, no, [False, True, False]]]), 2)
    assert held.positions.tolist() == [[[0, 2], [0, 2], [-1, 1], [-1, 1]]]
    assert held.there.tolist() == [[[True, True], [False, False], [False, False], [False, True]]]
    held.append(3, 4)
    keys, _ = layer.update(torch.randn(2, 1, 1, 3), torch.randn(2, 1, 1, 2))
    assert keys.shape == (2, 1, 3, 3) and keys[1, 0, 0].isnan().all() and keys[0].isfinite().all()
    held.check()


def test_what_is_read_once_is_held_by_every_entry() -> None:
    layer = ShortLayer()
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    layer.repeat(3)
    keys, values = layer.update(torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4))
    assert keys.shape == values.shape == (3, 2, 4, 4) and layer.seen == 4
    assert torch.equal(keys[0, :, :3], keys[2, :, :3]) and not torch.equal(keys[0, :, 3], keys[2, :, 3])


def test_an_evicted_key_does_not_return() -> None:
    layer = ShortLayer()
    held = HeldKeys([layer], 2, torch.device("cpu"))
    held.append(0, 4)
    layer.update(torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3))
    longest = held.cut(torch.tensor([[[True, False, True, True], [False, False, True, True]]]), 3)
    assert held.positions.tolist() == [[[0, 2, 3], [-1, 2, 3]]]
    assert longest == 3 and layer.longest() == 3
    held.append(4, 5)
    keys, _ = layer.update(torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3))
    assert keys.shape == (1, 2, 4, 3) and layer.get_seq_length() == 5
    assert keys[0, 1, 0].isnan().all() and keys[0, 0].isfinite().all() and keys[0, 1, 1:].isfinite().all()
    held.check()
    held.cut(torch.ones(1, 2, 5, dtype=torch.bool), 4)
    with pytest.raises(ReplayError, match="retains a key that is already evicted"):
        held.check()


def test_a_key_without_room_is_not_lost_silently() -> None:
    layer = ShortLayer()
    held = HeldKeys([layer], 1, torch.device("cpu"))
    held.append(0, 3)
    layer.update(torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2))
    held.cut(torch.ones(1, 1, 3, dtype=torch.bool), 2)
    with pytest.raises(ReplayError):
        held.check()
