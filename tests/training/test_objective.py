"""The gradients of training reach only the gates, and equal those of soft gates."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvscope.model.attention_hook import Call, Kernel, observe_attention, replace_attention
from kvscope.training.objective import attended, eviction_loss, language_loss, straight_through
from kvscope.training.tasks import TextReading, Texts
from tests.gates.make import gate
from tests.model.tiny import build, tokens

LENGTH = 14


def texts(prompt: int = 6) -> Texts:
    ids = tokens(LENGTH, batch=2)
    return Texts(ids, torch.ones(ids.shape), prompt)


def frozen(name: str = "llama") -> Any:
    return build(name).double().requires_grad_(False)


def test_straight_through_decides_hard_and_differentiates_soft() -> None:
    values = torch.tensor([0.2, 0.5, 0.5001, 0.9], requires_grad=True)
    flags = straight_through(values, 0.5)
    assert flags.tolist() == [0, 0, 1, 1]
    assert set(straight_through(torch.rand(1000), 0.5).tolist()) == {0, 1}, "with no rounding left over"
    flags.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None and values.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("form", "prefill"), [("causal", "stream"), ("causal", "full"), ("bidirectional", "full")])
def test_gradients_reach_the_gates_alone(form: str, prefill: str) -> None:
    model = frozen()
    made = gate(model, form=form).double().requires_grad_(True)
    loss, flags = TextReading(model, lambda _: texts(), []).loss(made, texts(), prefill)
    (loss + eviction_loss(flags, 0.1, "absolute")).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.config._attn_implementation == build("llama").config._attn_implementation


class Given:
    """Answers with flags that are given, hard or soft."""

    def __init__(self, flags: list[Tensor]) -> None:
        self.flags = flags

    def __call__(self, call: Call, kernel: Kernel) -> Tensor:
        return attended(call, self.flags[call.layer])


def soft(model: Any, flags: list[Tensor]) -> Tensor:
    """Return the language loss as a function of flags that may be any number."""
    given = texts()
    with replace_attention(model, Given(flags)):
        logits = model(input_ids=given.ids, use_cache=False).logits
    return language_loss(logits, given.ids, given.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_straight_through_gradient_is_that_of_the_soft_form(name: str) -> None:
    """Finite differences of the loss in every flag, at the hard decisions, handed on to the gates as their slope."""
    model = frozen(name)
    made = gate(model, sinks=1).double().requires_grad_(True)
    loss, flags = TextReading(model, lambda _: texts(), []).step(made, 0)
    assert 0.2 < torch.stack(flags).mean().item() < 0.8
    hard = [layer.detach().clone(memory_format=torch.contiguous_format) for layer in flags]
    assert soft(model, hard).item() == pytest.approx(loss.item(), abs=1e-12)
    slopes = [finite_differences(model, hard, layer) for layer in range(len(hard))]
    parameters = list(made.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    expected = torch.autograd.grad(flags, parameters, slopes)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-6
        assert torch.allclose(one, other, rtol=0, atol=1e-3 * float(other.abs().max()))


def finite_differences(model: Any, hard: list[Tensor], layer: int, step: float = 5e-3) -> Tensor:
    """Return how the loss changes with every flag of a layer, all others held as they are.

    Five points, since the step must be large: some models take their norms in float32 whatever their dtype.
    """
    slope = torch.zeros_like(hard[layer])
    with torch.no_grad():
        for place in range(slope.numel()):
            for sign, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                flags = [one.clone() for one in hard]
                flags[layer].view(-1)[place] += sign * step
                slope.view(-1)[place] += weight * float(soft(model, flags)) / (12 * step)
    return slope


def test_gates_of_the_first_layer_hear_from_those_of_the_second() -> None:
    """What a key does to later inputs counts too, through the values of later gates."""
    model = frozen()
    made = gate(model).double().requires_grad_(True)
    task = TextReading(model, lambda _: texts(), [])
    _, flags = task.step(made, 0)
    flags[1].sum().backward()  # type: ignore[no-untyped-call]
    assert made.layers[0].open.bias.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "phi3", "gpt_oss"])
def test_hard_flags_are_a_mask(name: str) -> None:
    """Multiplying and renormalising weights is the softmax over the retained keys; every query sees its own key."""
    model, calls = build(name), list[Call]()
    with torch.no_grad(), observe_attention(model, calls.append):
        model(input_ids=tokens(LENGTH), use_cache=False)
    for call in calls:
        groups = call.key.shape[1]
        flags = torch.rand(1, groups, LENGTH, generator=torch.Generator().manual_seed(2)).gt(0.5).float()
        seen = flags[:, :, None].bool() | torch.eye(LENGTH, dtype=torch.bool)
        rows = call.rows(0, LENGTH).view(1, groups, -1, LENGTH, LENGTH)
        missing = 1 - rows.sum(-1, keepdim=True) if call.sinks is not None else 0
        kept = rows * seen[:, :, None]
        live = kept / (kept.sum(-1, keepdim=True) + missing)
        expected = (live @ call.value[:, :, None]).flatten(1, 2).transpose(1, 2)
        assert torch.allclose(attended(call, flags), expected, atol=1e-5)


def test_both_prefills_take_turns_where_the_gate_serves_both() -> None:
    model, seen = frozen(), list[int]()
    for form, expected in (("causal", [LENGTH, 6, LENGTH]), ("bidirectional", [6, 6, 6])):
        made = gate(model, form=form).double()
        task = TextReading(model, lambda _: texts(), [texts()] * 3)
        seen = [flags[0].shape[-1] for _, flags in task.held_out(made)]
        assert seen == expected == [task.step(made, number)[1][0].shape[-1] for number in range(3)]


def test_open_gates_are_the_model() -> None:
    model, given = frozen(), texts()
    made = gate(model, sinks=LENGTH)
    found, flags = TextReading(model, lambda _: given, []).loss(made.double(), given, "stream")
    plain = language_loss(model(input_ids=given.ids).logits, given.ids, given.weights)
    assert found.item() == pytest.approx(plain.item(), abs=1e-12)
    assert all((layer == 1).all() for layer in flags)


def test_weights_say_which_tokens_count() -> None:
    logits, ids = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    losses = -torch.log_softmax(logits[0, :-1], -1)[torch.arange(3), ids[0, 1:]]
    weights = torch.tensor([[9.0, 1.0, 0.0, 3.0]])
    assert float(language_loss(logits, ids, weights)) == pytest.approx(float((losses[0] + 3 * losses[2]) / 4), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "loss", "slopes"),
    [("one-sided", 0.25, [0.25, 0]), ("absolute", 0.75, [0.25, -0.25]), ("square", 0.3125, [0.125, -0.25])],
)
def test_eviction_losses(kind: Any, loss: float, slopes: list[float]) -> None:
    flags = [torch.tensor([[[1.0, 1, 1, 0]]], requires_grad=True), torch.zeros(1, 1, 4, requires_grad=True)]
    found = eviction_loss(flags, 0.5, kind)
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(loss)
    for layer, slope in zip(flags, slopes, strict=True):
        assert layer.grad is not None and layer.grad[0, 0].tolist() == pytest.approx([slope] * 4)
