"""How presses are written, which are refused, and what is said where kvpress is not installed. None of it is needed."""

import builtins
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kvscope
from kvscope.cli.app import run
from kvscope.core.errors import UsageError
from kvscope.core.options import PlanOptions
from kvscope.engine.feasible import make_plan
from kvscope.experiments import cells
from kvscope.policies.cited import cited_in
from kvscope.policies.press import EXAMPLE, Press, PressCall, parse_press
from kvscope.policies.spec import parse_policies, parse_policy
from kvscope.presses import build as building
from kvscope.presses.choose import _positions, ratio_of
from kvscope.presses.support import REFUSED, SUPPORTED, require_supported

EXAMPLE_TRACE = Path(kvscope.__file__).parent.parent / "traces" / "example"


def test_a_press_is_written_as_in_python() -> None:
    made = parse_press(" AdaKVPress( SnapKVPress(window_size=32,kernel_size=5), alpha_safeguard=-.25)")
    snap = PressCall("SnapKVPress", settings=(("window_size", 32), ("kernel_size", 5)))
    assert made == PressCall("AdaKVPress", (snap,), (("alpha_safeguard", -0.25),))
    assert str(made) == "AdaKVPress(SnapKVPress(window_size=32, kernel_size=5), alpha_safeguard=-0.25)"
    assert parse_press(str(made)) == made
    assert parse_press("KnormPress") == parse_press("KnormPress()") == PressCall("KnormPress")
    several = parse_press("ComposedPress([KnormPress(), CURPress(leverage_type='key', num_sinks=2)])")
    assert [each.name for each in several.nested()] == ["ComposedPress", "KnormPress", "CURPress"]
    assert parse_press(str(several)) == several


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Snap KVPress()",
        "SnapKVPress(window_size=)",
        "SnapKVPress(window_size=open('f'))(1)",
        "3",
        "os.system('x')",
        "SnapKVPress(**{})",
        "SnapKVPress(window_size=1+x)",
        "SnapKVPress(window_size={1: 2})",
    ],
)
def test_other_texts_are_refused_and_not_run(text: str) -> None:
    with pytest.raises(UsageError, match="is not a press with its arguments") as error:
        parse_policy(f"kvpress:{text}")
    assert EXAMPLE in error.value.todo


def test_values_are_named() -> None:
    with pytest.raises(UsageError, match="a value without a name"):
        parse_policy("kvpress:SnapKVPress(0.5)")


def test_a_press_is_a_policy_with_a_label_that_names_it() -> None:
    first, second = parse_policies(["kvpress:SnapKVPress(window_size=32,kernel_size=5)", "h2o"])
    assert isinstance(first, Press) and first.label == "kvpress:SnapKVPress(window_size=32, kernel_size=5)"
    assert parse_policy(first.label) == first and hash(parse_policy(first.label)) == hash(first)
    assert second.name == "h2o"
    with pytest.raises(UsageError, match="named twice"):
        parse_policies(["kvpress:KnormPress", "kvpress:KnormPress()"])


@pytest.mark.parametrize(
    ("text", "bounded"),
    [
        ("SnapKVPress()", True),
        ("AdaKVPress(press=SnapKVPress())", True),
        ("SnapKVPress(compression_ratio=0.5)", False),
        ("AdaKVPress(press=SnapKVPress(compression_ratio=0.5))", False),
        ("PerLayerCompressionPress(press=KnormPress(), compression_ratios=[0.5])", False),
        ("SimLayerKVPress()", False),
        ("ComposedPress([KnormPress()])", False),
    ],
)
def test_a_ratio_in_the_press_takes_the_place_of_the_budget(text: str, bounded: bool) -> None:
    assert parse_policy(f"kvpress:{text}").traits.bounded is bounded


def test_a_ratio_is_given_to_the_press_that_scores() -> None:
    made = parse_press("AdaKVPress(press=CriticalKVPress(SnapKVPress(window_size=8)))").at_ratio(0.8)
    inner = "SnapKVPress(window_size=8, compression_ratio=0.8)"
    assert str(made) == f"AdaKVPress(press=CriticalKVPress({inner}))"


@pytest.mark.parametrize("prompt", [1, 2, 3, 7, 48, 49, 100, 101, 128, 1000, 4099])
def test_the_ratio_of_a_budget_retains_as_many_keys(prompt: int) -> None:
    for keys in range(1, prompt + 1):
        ratio = ratio_of(keys, prompt)
        assert int(prompt * (1 - ratio)) == keys
        assert abs(ratio - (1 - keys / prompt)) < 1e-12
    assert ratio_of(prompt + 5, prompt) == 0.0


def test_a_plain_quotient_would_retain_one_key_less() -> None:
    """The reason for `ratio_of`: 1 - 20 / 100 is 0.8, at which kvpress retains 19 of 100 keys."""
    assert int(100 * (1 - 0.8)) == 19 and int(100 * (1 - ratio_of(20, 100))) == 20


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError) as error:
        require_supported(PressCall("AdaKVPress", settings=(("press", PressCall(name)),)))
    assert error.value.what.startswith(f"kvpress:{name} cannot be followed: it ")
    assert error.value.todo.endswith(".") and "\n" not in error.value.what + error.value.todo


def test_no_press_is_both_followed_and_refused() -> None:
    assert not set(SUPPORTED) & set(REFUSED)
    for name, support in SUPPORTED.items():
        assert parse_press(support.example).name == name
        require_supported(parse_press(support.example))
        assert parse_press(support.example).sized is (support.kind == "own size")


def test_kvpress_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(building, "version", version)
    building.kvpress.cache_clear()
    with pytest.raises(UsageError, match="kvpress is not installed") as error:
        kvscope.replay(kvscope.open(EXAMPLE_TRACE), ["kvpress:KnormPress()"], output=tmp_path / "r")
    assert error.value.todo == "Install it: pip install 'kvscope[kvpress]'"
    building.kvpress.cache_clear()


def test_another_version_of_kvpress_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "version", lambda name: "0.50.0")
    building.kvpress.cache_clear()
    with pytest.raises(UsageError, match=r"kvpress 0.50.0 is installed, and its presses were not compared"):
        building.kvpress()
    building.kvpress.cache_clear()


def test_a_refused_press_needs_no_kvpress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name != "kvpress", "kvpress is not needed to say that a press is refused"
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match="ThinKPress cannot be followed: it removes channels of keys"):
        kvscope.replay(kvscope.open(EXAMPLE_TRACE), ["kvpress:ThinKPress()"], output=tmp_path / "r")


@pytest.mark.parametrize("choice", [{"compress": "step"}, {"allocate": "ada"}, {"scope": "layer"}])
def test_the_plan_of_a_press_is_its_own(choice: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"reproduces published code|decides itself"):
        make_plan(parse_policy("kvpress:KnormPress()"), PlanOptions(**choice), latent=False)  # type: ignore[arg-type]


def test_streaming_prefill_is_refused(tmp_path: Path) -> None:
    plan = make_plan(parse_policy("kvpress:KnormPress()"), PlanOptions(), latent=False)
    with pytest.raises(UsageError, match="is not defined for stream prefill"):
        plan.require("stream")  # type: ignore[arg-type]


def test_a_press_without_its_choice_does_not_decide() -> None:
    press = parse_policy("kvpress:KnormPress()")
    step: Any = type("S", (), {"compresses": True})()
    with pytest.raises(UsageError, match="has no choice for this text"):
        press.observe(step, torch.zeros(1, 1, 1, 4))


def test_keys_are_found_by_their_bytes() -> None:
    full = [b"a", b"b", b"a", b"c"]
    assert _positions(full, [b"c", b"a"]) == [3, 0]
    assert _positions(full, [b"a", b"a"]) == [0, 2]
    assert _positions(full, [b"a", b"a", b"a"]) is None
    assert _positions(full, [b"x"]) is None


def test_kvpress_is_cited_and_its_version_is_part_of_what_an_experiment_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    press, other = parse_policies(["kvpress:KnormPress()", "h2o"])
    (source,) = cited_in("kvpress", press.label, press.parameters(), "uniform")
    assert source.known and source.citation is not None and source.citation.arxiv == "2510.00636"
    monkeypatch.setattr(cells, "versions", lambda name: {name: "0.5.5"})
    assert cells.policy_identity(press)["kvpress"] == "0.5.5"
    assert "kvpress" not in cells.policy_identity(other)


def test_the_command_that_lists_presses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policies", "kvpress", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [row["press"] for row in made["followed"]] == list(SUPPORTED)
    assert [row["press"] for row in made["refused"]] == list(REFUSED)
    assert all(row["why"] and row["instead"] for row in made["refused"])
    assert run(["policies", "kvpress"]) == 0
    shown = capsys.readouterr().out
    assert "SnapKVPress" in shown and "ThinKPress" in shown
