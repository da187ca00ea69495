"""Words on the command line: whatever is mistyped is said, never ignored."""

from pathlib import Path

import pytest

from kvscope.errors import UsageError
from kvscope.policies import POLICIES, Policy, policy
from kvscope.policies.spec import describe, parse_policies

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
        (["a2fs"], {}, "no policy is called 'a2fs'", "Did you mean a2sf?"),
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
