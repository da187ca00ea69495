"""What is said where kvpress, or a press of it, refuses; and presses that kvpress lets a user add."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.memory import OutOfMemory, out_of_memory
from kvscope.policies.press import parse_press
from kvscope.presses.build import build, kvpress
from kvscope.presses.choose import chosen_by
from kvscope.presses.support import REFUSED, SUPPORTED
from tests.model.tiny import build as tiny
from tests.presses.live import model_of, needs_kvpress

pytestmark = needs_kvpress
IDS = torch.arange(3, 35)


def test_every_press_of_kvpress_is_followed_or_refused() -> None:
    module = kvpress()
    bases = {"BasePress", "ScorerPress"}
    presses = {name for name, it in vars(module).items() if isinstance(it, type) and issubclass(it, module.BasePress)}
    assert presses - bases == set(SUPPORTED) | set(REFUSED)


@pytest.mark.parametrize(
    ("text", "what", "todo"),
    [
        ("SnapKvPress()", "has no press called 'SnapKvPress'", "SnapKVPress"),
        ("BasePress()", "it is neither a ScorerPress nor a wrapper that was compared", "docs/kvpress.md"),
        ("SnapKVPress(windows_size=3)", "SnapKVPress has no parameter 'windows_size'", "Did you mean window_size"),
        ("KnormPress(compression_ratio=1.5)", "cannot be made: Compression ratio must be between", "compression_ratio"),
        ("AdaKVPress(press=SimLayerKVPress())", "cannot be made: AdaKVPress requires a ScorerPress", "press"),
        ("AdaKVPress()", "cannot be made", "press, alpha_safeguard"),
    ],
)
def test_a_press_that_cannot_be_made(text: str, what: str, todo: str) -> None:
    with pytest.raises(UsageError) as error:
        build(parse_press(text))
    assert what in error.value.what and todo in error.value.todo
    assert "\n" not in error.value.what + error.value.todo


def test_what_a_press_says_of_a_prompt_is_passed_on() -> None:
    with pytest.raises(UsageError, match="fails on a prompt of 32 tokens: Query length 32 should be greater than") as e:
        chosen_by(model_of(), IDS, parse_press("SnapKVPress(window_size=64)"), 8)
    assert "longer prompt" in e.value.todo


def test_a_model_without_such_modules() -> None:
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel has no attention modules at model.layers"):
        chosen_by(tiny("gpt2"), IDS, parse_press("KnormPress()"), 8)


def added(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> None:
    """Add a press called OwnPress to kvpress, with these methods."""
    cls = dataclass(type("OwnPress", (kvpress().ScorerPress,), methods))
    monkeypatch.setattr(kvpress(), "OwnPress", cls, raising=False)


def test_any_scorer_press_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(
        self: Any, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, rows: object, kwargs: Any
    ) -> Tensor:
        return torch.arange(keys.shape[2], dtype=keys.dtype).expand(keys.shape[:3])

    added(monkeypatch, score=score)
    kept = chosen_by(model_of(), IDS, parse_press("OwnPress()"), 5).kept
    assert all(row.nonzero().flatten().tolist() == [27, 28, 29, 30, 31] for of in kept.values() for row in of)


def test_a_press_that_changes_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(self: Any, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Any:
        values[:, :, 0] += 1  # in place: the values before it are compared, not these
        return keys, values

    added(monkeypatch, compress=compress)
    with pytest.raises(UsageError, match=r"OwnPress.. cannot be followed: it changes the keys or values"):
        chosen_by(model_of(), IDS, parse_press("OwnPress()"), 5)


def test_an_error_that_says_that_memory_is_exceeded_is_not_one_of_the_press(monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(self: Any, *rest: object) -> Any:
        raise MemoryError("out of memory")

    added(monkeypatch, compress=compress)
    model = model_of()
    with pytest.raises(MemoryError):
        chosen_by(model, IDS, parse_press("OwnPress()"), 5)
    assert not any(module._forward_hooks for module in model.modules()), "hooks are removed after an error"
    assert isinstance(out_of_memory(MemoryError()), OutOfMemory)


def test_a_layer_with_a_sliding_window_is_not_cut() -> None:
    with pytest.raises(UsageError, match="cuts the cache of a layer with a sliding window"):
        chosen_by(tiny("mistral"), IDS, parse_press("KnormPress()"), 8)


def test_kvscope_loads_kvpress_only_where_a_press_is_run() -> None:
    code = (
        "import sys; from kvscope.policies.spec import parse_policy; import kvscope.replay.compile;"
        "parse_policy('kvpress:KnormPress()'); import kvscope.presses.build; assert 'kvpress' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_import_of_kvpress_leaves_the_attention_functions_of_transformers() -> None:
    code = (
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as them; before = dict(them);"
        "from kvscope.presses.build import kvpress; kvpress(); assert dict(them) == before;"
        "from kvpress.attention_patch import patch_attention_functions; patch_attention_functions();"
        "assert dict(them) != before, 'kvpress replaces them'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_it_in_two_lines(tmp_path: Path) -> None:
    trace = Path(__file__).parents[2] / "traces" / "example"
    words = ["replay", str(trace), "--policy", "kvpress:KVzipPress()", "-o", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-m", "kvscope", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "kvpress:KVzipPress cannot be followed: it runs the model over the prompt again" in done.stderr
