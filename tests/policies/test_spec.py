"""Words on the command line: whatever is mistyped is said, never ignored."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.policies import POLICIES, Policy, policy
from kvscope.policies.describe import describe
from kvscope.policies.spec import parse_policies, parse_policy
from tests.own_code import forget_members, forget_modules

USER = """
from dataclasses import dataclass
from kvscope.policies import Policy, parameter

@dataclass(frozen=True)
class Oldest(Policy):
    \"\"\"Keep the oldest keys.\"\"\"

    needs = frozenset()
    paper = "none"
    shift: int = parameter(0, "nothing")

    def observe(self, step, score):
        score[..., -1] = self.shift - step.t
        return score

class Bare(Policy):
    pass
"""


def test_settings_and_shared_parameters() -> None:
    a2sf, h2o, window = parse_policies(["a2sf:recent=16", "h2o", "window"], {"alpha": "0.7", "recent": "4"})
    assert (a2sf.alpha, a2sf.recent) == (0.7, 16)
    assert h2o.recent == 4
    assert [p.label for p in (a2sf, h2o, window)] == ["a2sf(alpha=0.7, recent=16)", "h2o(recent=4)", "window"]


@pytest.mark.parametrize(
    ("specs", "params", "what", "todo"),
    [
        (["a2fs"], {}, "no policy is called 'a2fs'", "Did you mean a2sf or raas?"),
        (["tova"], {"alpha": "0.7"}, "none of the named policies has a parameter --alpha", "belongs to: a2sf"),
        (["a2sf"], {"alhpa": "1"}, "none of the named policies has a parameter --alhpa", "Did you mean alpha"),
        (["a2sf:beta=1"], {}, "policy a2sf has no parameter 'beta'", ""),
        (["a2sf:alpha"], {}, "'alpha' in 'a2sf:alpha' is not a setting", "name=value"),
        (["a2sf:alpha=x"], {}, "a2sf: alpha='x' is not float", "kvscope policies a2sf"),
        (["a2sf:alpha=1.5"], {}, "alpha=1.5 is out of range", "from 0 to 1"),
        (["a2sf:alpha=nan"], {}, "alpha=nan is out of range", ""),
        (["a2sf:recent=1.5"], {}, "a2sf: recent='1.5' is not int", ""),
        (["h2o:group=median"], {}, "h2o: group='median' is not mean | max | sum", ""),
        (["tova", "tova"], {}, "policy tova is named twice", ""),
        (["missing.py:X"], {}, "no file missing.py", ""),
        (["missing.py:X(a=1)"], {}, "no file missing.py", ""),
        (["a2sf:alpha=1,alpha=0"], {}, "alpha is set twice in 'a2sf:alpha=1,alpha=0'", "once"),
        (["a2sf(alpha=1"], {}, "no policy is called 'a2sf(alpha=1'", "a2sf"),
        (["vatp:base=a2sf(alpha=0.7"], {}, "parentheses do not match", ""),
        (["vatp:base=a2sf)alpha=0.7("], {}, "parentheses do not match", ""),
        (["vatp:base=a2sf(alpha=x)"], {}, "a2sf: alpha='x' is not float", "kvscope policies a2sf"),
        (["roco:variant=mask"], {}, "roco: variant='mask' is not plain | easykv", ""),
    ],
)
def test_mistakes(specs, params, what, todo) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policies(specs, params)
    assert what in caught.value.what
    assert todo in caught.value.todo


def test_a_class_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    made, again = parse_policies([f"{file}:Oldest", f"{file}:Oldest:shift=3"])
    assert parse_policy(f"{file}:Oldest(shift=3)") == again
    assert made.label == "Oldest" and again.label == "Oldest(shift=3)"
    with pytest.raises(UsageError, match="has no class Oldset"):
        parse_policies([f"{file}:Oldset"])
    with pytest.raises(UsageError, match="not a dataclass"):
        parse_policies([f"{file}:Bare"])
    with pytest.raises(UsageError, match="not a policy"):
        parse_policies([f"{file}:dataclass"])
    broken = tmp_path / "broken.py"
    broken.write_text("1/0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        parse_policies([f"{broken}:X"])


@pytest.mark.parametrize("forget", [True, False])  # as a new process does, or in one notebook
def test_an_edited_file_is_run_again(forget: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if size and time of the file are as before, by which Python's import takes a compiled file for current."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    source = USER.replace("kvscope.policies import", "kvscope import policy,").replace(
        "@data", '@policy("mine")\n@data'
    )
    for value in (1, 2):
        file.write_text(source.replace("parameter(0", f"parameter({value}"))
        os.utime(file, (10**9, 10**9))
        assert parse_policy(f"{file}:Oldest").parameters()["shift"] == value
        if forget:
            forget_modules()
            forget_members()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"], "nothing is written beside the file"


@pytest.mark.parametrize(
    "spec",
    ["tova", "a2sf:alpha=0.7,recent=16", "h2o:recent=3", "vatp:base=a2sf(alpha=0.7,recent=4),norm=l2,sinks=3"],
)
def test_a_label_names_the_policy_again(spec: str) -> None:
    made = parse_policy(spec)
    assert parse_policy(made.label) == made


def test_commas_inside_parentheses_belong_to_the_inner_policy() -> None:
    made = parse_policy("vatp: base = a2sf( alpha=0.7, recent=4 ), sinks=3")
    assert made.parameters() | {"base": "a2sf(alpha=0.7, recent=4)", "sinks": 3} == made.parameters()


def test_a_path_may_hold_signs_of_settings(tmp_path: Path) -> None:
    folder = tmp_path / "a=b (1)"
    folder.mkdir()
    (folder / "mine.py").write_text(USER)
    assert parse_policy(f"{folder}/mine.py:Oldest:shift=2").label == "Oldest(shift=2)"


def test_none_is_a_value_where_the_type_allows_it() -> None:
    assert parse_policies(["h2o:recent=none"])[0].recent is None


def test_a_name_is_given_once() -> None:
    with pytest.raises(UsageError, match="registered twice"):

        @policy("tova")
        class Other(Policy):
            """Another."""

    assert POLICIES.get("tova").__module__ == "kvscope.policies.tova"


def test_description_names_types_and_defaults() -> None:
    (row,) = describe("a2sf")
    assert row["parameters"][0]["name"] == "alpha" and row["parameters"][0]["default"] == 0.2
    assert row["parameters"][2]["type"] == "mean | max | sum"
    assert row["needs"] == ["weights"]


def test_description_has_the_traits_of_the_defaults_and_the_variants() -> None:
    rows = {row["name"]: row for row in describe()}
    assert rows["vatp"]["needs"] == ["value_l1", "weights"] and rows["vatp"]["variants"] == ["plain", "mask"]
    assert rows["tova"]["scope"] == "layer" and rows["tova"]["bounded"] and rows["tova"]["allocate"] == "uniform"
    assert rows["a2sf"]["phase"] == "step" and not rows["a2sf"]["reads"] and not rows["a2sf"]["published"]
    assert rows["keyformer"]["prefills"] == ["full"] and rows["keyformer"]["variants"] == []
    assert rows["quest"]["reads"]
    json.dumps(rows)


def test_description_of_a_policy_with_a_parameter_that_must_be_given() -> None:
    @policy("must-be-told")
    @dataclass(frozen=True)
    class MustBeTold(Policy):
        """Needs a number."""

        phase = "prefill"
        number: int

    try:
        (row,) = describe("must-be-told")
    finally:
        POLICIES.remove("must-be-told")
    assert row["phase"] == "prefill" and row["needs"] == ["weights"]
