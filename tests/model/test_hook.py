"""The hook observes the attention of a model, does not change its output, and restores the model afterwards."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvscope.core.errors import ModelError
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.obstacles import OWN_CODE
from kvscope.model.recorder import Recorder
from kvscope.model.selfcheck import _check_rows, self_check
from tests.model.tiny import MODELS, WINDOW, build, tokens
from tests.reference import attention as twin

PROMPT, LENGTH = 9, 14
HALF = 2**-11  # relative rounding of float16


class Collector:
    """A stand-in for `TraceWriter` that keeps blocks by layer and position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], torch.Tensor] = {}
        self.norms: dict[tuple[int, int], float] = {}

    def packed_attention(self, layer, sequence, first, weights, row_sum, *, stride) -> None:
        assert stride == 1
        stop = 0
        for position in range(first, first + row_sum.shape[1]):
            start, stop = stop, stop + position + 1
            self.rows[layer, position] = torch.tensor(weights[:, start:stop]).float()
        assert stop == weights.shape[1]

    def keys(self, layer, sequence, first, **norms) -> None:
        for index in range(norms["value_l1"].shape[1]):
            self.norms[layer, first + index] = norms["value_l1"][:, index]

    def queries(self, layer, sequence, first, mean_query) -> None:
        assert mean_query.ndim == 2


def generate(model, ids) -> list[torch.Tensor]:
    """Return the logits of a prefill and of steps after it."""
    cache = DynamicCache(config=model.config)
    logits = [model(input_ids=ids[:, :PROMPT], past_key_values=cache).logits]
    logits += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, ids.shape[1])]
    return logits


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_rows_are_those_of_eager_attention_and_logits_do_not_move(name: str) -> None:
    model, ids = build(name), tokens(LENGTH)
    plain = generate(model, ids)
    collector = Collector()
    recorder = Recorder(collector, range(2), query_block=4)
    recorder.begin(0)
    with observe_attention(model, recorder):
        watched = generate(model, ids)
    recorder.end()
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    eager = build(name, "eager")(input_ids=ids, output_attentions=True, use_cache=False).attentions
    assert len(collector.rows) == 2 * LENGTH == len(collector.norms)
    for (layer, t), rows in collector.rows.items():
        assert torch.allclose(rows, eager[layer][0, :, t, : t + 1], rtol=HALF, atol=1e-6), (layer, t)


@torch.inference_mode()
def test_without_a_prompt_row_the_window_is_where_it_belongs() -> None:
    """A sliding cache holds the newest keys only: their weights must land on their positions, not at the start."""
    model, ids = build("mistral"), tokens(LENGTH)
    collector = Collector()
    recorder = Recorder(collector, [0], query_block=64)
    recorder.begin(0)
    with observe_attention(model, recorder):
        generate(model, ids)
    recorder.end()
    row = collector.rows[0, LENGTH - 1]
    assert (row[:, : LENGTH - WINDOW] == 0).all()
    assert (row[:, LENGTH - WINDOW :] > 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.inference_mode()
def test_rows_equal_the_plain_loop(name: str) -> None:
    calls: list[Call] = []
    model = build(name)
    with observe_attention(model, calls.append):
        model(input_ids=tokens(7), use_cache=False)
    for call in calls:
        rows = call.rows(2, 7)[0]
        share = call.query.shape[1] // call.key.shape[1]
        for head in range(call.query.shape[1]):
            keys = call.key[0, head // share].tolist()
            sink = None if call.sinks is None else call.sinks[head].item()
            for t in range(2, 7):
                expected = twin.row(
                    call.query[0, head, t].tolist(), keys, t, call.scaling, call.softcap, sink, call.sliding_window
                )
                assert rows[head, t - 2, : t + 1].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_oss"])
@torch.inference_mode()
def test_left_padding_carries_no_weight(name: str) -> None:
    model, ids, pad = build(name), tokens(8), 3
    calls: list[Call] = []
    with observe_attention(model, calls.append):
        model(input_ids=ids, use_cache=False)
        alone = [call.rows(0, 8)[0] for call in calls]
        calls.clear()
        padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = model(
            input_ids=torch.cat([padded, tokens(8 + pad, seed=5)]),
            attention_mask=torch.cat([mask, torch.ones_like(mask)]),
            position_ids=torch.cat([positions, torch.arange(8 + pad)[None]]),
            use_cache=False,
        )
    assert torch.isfinite(both.logits[0, pad:]).all()
    for call, expected in zip(calls, alone, strict=True):
        rows = call.rows(pad, 8 + pad)[0]
        assert (rows[..., :pad] == 0).all()
        assert torch.allclose(rows[..., pad:], expected, atol=1e-5)


def registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS.keys()) | set(ALL_MASK_ATTENTION_FUNCTIONS.keys())


def test_nothing_is_left_behind() -> None:
    model = build("gemma3")
    before, kernel = registered(), model.config._attn_implementation
    with observe_attention(model, lambda call: None):
        assert registered() != before
        assert model.config._attn_implementation != kernel
    assert registered() == before
    assert model.config._attn_implementation == kernel
    with pytest.raises(RuntimeError, match="inside"), observe_attention(model, lambda call: None):
        raise RuntimeError("inside")
    assert registered() == before
    assert model.config._attn_implementation == kernel


OWN = {
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)),
}


@pytest.mark.parametrize("name", OWN)
def test_models_outside_the_registry_run_no_policies(name: str) -> None:
    model = OWN[name]()
    what = f"{type(model).__name__} does not use transformers' attention registry but code of its own, so policies"
    with pytest.raises(ModelError, match=f"{what} cannot run inside its attention\n.*without --perplexity"):
        self_check(model, tokens(5))
    assert model.config.model_type in OWN_CODE, "so that it is loaded with eager attention, whose modules return rows"


def test_an_encoder_is_refused() -> None:
    """Without is_decoder a BERT sees later tokens, and gives no mask that says so."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ModelError, match=r"looks at later tokens, as an encoder .*\n.*is_decoder"):
        self_check(BertLMHeadModel(BertConfig(**sizes)).eval(), tokens(5))
    assert self_check(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval(), tokens(5)).heads == 4


def test_a_kernel_that_returns_no_rows_is_refused() -> None:
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ModelError, match="flex_attention"), observe_attention(model, lambda call: None):
        pass


@pytest.mark.parametrize("name", MODELS)
def test_facts_of_the_self_check(name: str) -> None:
    facts = self_check(build(name), tokens(12))
    assert facts.heads == 4
    assert facts.kv_heads == (4 if name in ("gpt2", "opt", "gpt_neox") else 2)
    assert facts.head_dim == 8
    assert facts.learned_sinks == (name == "gpt_oss")
    assert (facts.softcap is not None) == (name == "gemma2")
    windows = {"mistral": [5, 5], "gemma2": [5, None], "gemma3": [5, None], "gpt_oss": [5, None]}
    assert list(facts.windows.values()) == windows.get(name, [None, None])


def test_the_self_check_finds_a_model_that_looks_ahead() -> None:
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    looks = Call(0, *(torch.randn(1, 2, 6, 4) for _ in range(3)), mask=everything, scaling=1.0)
    with pytest.raises(ModelError, match="looks at later tokens"):
        _check_rows("Model", looks)


def test_the_self_check_finds_a_kernel_that_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ModelError, match="no attention of LlamaForCausalLM was seen"):
        self_check(model, tokens(5))


def test_inputs_of_modules_are_observed_only_where_they_are_read() -> None:
    model, calls = build("llama"), []
    with observe_attention(model, calls.append, inputs=False):
        assert not any(module._forward_pre_hooks for module in model.modules())
        model(input_ids=tokens(3))
    assert [call.hidden for call in calls] == [None, None]
    with observe_attention(model, calls.append):
        model(input_ids=tokens(3))
    assert [call.hidden is None for call in calls] == [True, True, False, False]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("hidden", [False, True])
def test_a_recording_asks_for_inputs_only_to_store_them(hidden: bool) -> None:
    assert Recorder(Collector(), [0], hidden=hidden).reads_inputs is hidden
