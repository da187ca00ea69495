"""Discovery: a new member is one new file, and the listed order does not depend on what was imported first."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.core.registry import Registry
from tests.forks import Forks

POLICIES = (
    "a2sf snapkv ada-kv attention-gate belady blend cake chunkkv compactor criticalkv curdkv dms duo-attention "
    "expected-attention fastgen finch full h2o headkv ideal indexer key-norm keydiff keyformer kvzap kvzip lacache "
    "lagkv lru morphkv pyramidinfer pyramidkv q-filters quest r-kv raas random recycled-attention refreshkv roco "
    "scissorhands simlayerkv streaming-llm switch tova union vatp window"
).split()
METRICS = (
    "ideal_cosine ideal_cosine_flattened full_cosine read_keys held_keys late_mass_retained retained_mass "
    "retained_mass_no_sinks ideal_mass ideal_mass_no_sinks output_error mask_cosine ideal_recall recovered_mass "
    "recovered_mass_no_sinks"
).split()
PANELS = (
    "overview compare answers caches budget-curve sweep depth outcome over-time head-map residency spans text regrets "
    "inspector agreement norms queries provenance"
).split()
COMMANDS = (
    "trace replay run reproduce perplexity verify tune score regret spans heads report plot diff compare export info "
    "policies models import pack unpack demo tasks gate"
).split()

LIST = {
    "policies": "from kvscope.policies import POLICIES as r; print(*[n for n, c in r.items() if ours(c)])",
    "metrics": "from kvscope.metrics import METRICS as r; print(*[n for n, m in r.items() if ours(m.compute)])",
    "panels": "from kvscope.report.page import ordered_panels as r; print(*[p.name for p in r() if ours(p.build)])",
    "commands": "import typer; from kvscope.cli.app import program; print(*typer.main.get_command(program()).commands)",
}


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """A function that returns what code prints in an interpreter that has not loaded kvscope."""
    own = "import sys\nassert not any(name.startswith('kvscope') for name in sys.modules)\n"
    own += "def ours(thing): return thing.__module__.startswith('kvscope.')\n"

    def printed(code: str) -> str:
        done = forks.run(own + code)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with Forks("torch", "pandas", "typer", "rich.table") as forks:
        yield printed


@pytest.mark.parametrize(
    ("first", "what", "expected"),
    [
        ("kvscope.policies", "policies", POLICIES),
        ("kvscope.policies.window", "policies", POLICIES),
        ("kvscope.policies.cake", "policies", POLICIES),  # imports snapkv, which is to come before ada-kv
        ("kvscope.metrics", "metrics", METRICS),
        ("kvscope.metrics.recovered", "metrics", METRICS),
        ("kvscope.report", "panels", PANELS),
        ("kvscope.report.panels.sweep", "panels", PANELS),
        ("kvscope.cli", "commands", COMMANDS),
        ("kvscope.cli.score", "commands", COMMANDS),
    ],
)
def test_the_order_is_the_same_whatever_was_imported_first(
    first: str, what: str, expected: list[str], fresh: Callable[[str], str]
) -> None:
    assert fresh(f"import {first}\n{LIST[what]}").split() == expected


def test_commands_are_all_there_when_they_are_looked_up_before_the_app_is_built(fresh: Callable[[str], str]) -> None:
    look_up = "from kvscope.cli.command import COMMANDS; COMMANDS.names()\n"
    assert fresh(look_up + LIST["commands"]).split() == COMMANDS


POLICY = '''
from dataclasses import dataclass
from kvscope.policies.base import Policy, policy

@policy("fade")
@dataclass(frozen=True)
class Fade(Policy):
    """Keep the keys that the newest row attends to."""

    def observe(self, step, score):
        return step.weights()
'''
METRIC = '''
from kvscope.metrics.base import metric

@metric("fade", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def fade(rows):
    """Share of something."""
'''
PANEL = '''
from kvscope.report.panel import panel

@panel("fade", title="Fade", order=5, help="Read it.")
def fade(source):
    """Return nothing."""
'''
COMMAND = '''
from kvscope.cli.command import command

@command("fade", order=5)
def fade() -> None:
    """Say something that is long enough to be a line of help."""
'''


@pytest.mark.parametrize(
    ("package", "what", "text", "place"),
    [
        (
            "kvscope.policies",
            "policies",
            POLICY,
            POLICIES.index("fastgen"),
        ),  # fade.py, fastgen.py
        ("kvscope.metrics", "metrics", METRIC, METRICS.index("read_keys")),  # after cosine.py, before keys.py
        ("kvscope.report.panels", "panels", PANEL, 0),
        ("kvscope.cli", "commands", COMMAND, 0),
    ],
)
def test_a_new_member_is_one_new_file(
    package: str, what: str, text: str, place: int, tmp_path: Path, fresh: Callable[[str], str]
) -> None:
    (tmp_path / "fade.py").write_text(text)
    (tmp_path / "fade.js").write_text("")  # what draws a panel
    listed = fresh(f"import {package}\n{package}.__path__.append({str(tmp_path)!r})\n{LIST[what]}").split()
    known = {"policies": POLICIES, "metrics": METRICS, "panels": PANELS, "commands": COMMANDS}[what]
    assert listed == [*known[:place], "fade", *known[place:]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "things_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from kvscope.core.registry import Registry\nTHINGS = Registry('thing', package=__name__)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("things_of_a_test")]:
        del sys.modules[name]


def things(folder: Path, **files: str) -> "Registry[type]":
    for name, text in files.items():
        (folder / f"{name}.py").write_text("from things_of_a_test import THINGS\n" + text)
    import things_of_a_test  # type: ignore[import-not-found]

    found: Registry[type] = things_of_a_test.THINGS
    return found


def test_modules_are_listed_by_name_and_bases_before_what_derives_from_them(package: Path) -> None:
    found = things(
        package,
        a="from things_of_a_test.z import Base\nclass A(Base): pass\nTHINGS.register('derived', A)",
        b="class Two: pass\nclass One: pass\nTHINGS.register('two', Two)\nTHINGS.register('one', One)",
        z="class Base: pass\nclass Last: pass\nTHINGS.register('base', Base)\nTHINGS.register('last', Last)",
    )
    found.register("from outside", int)
    assert found.names() == ["base", "derived", "two", "one", "last", "from outside"]
    assert [name for name, _ in found.items()] == found.names()


def test_a_module_that_fails_fails_at_every_look_up(package: Path) -> None:
    found = things(package, a="class A: pass\nTHINGS.register('a', A)", b="raise RuntimeError('broken file')")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken file"):
            found.names()


def test_a_name_belongs_to_one_definition() -> None:
    registry: Registry[object] = Registry("thing")

    def once() -> None: ...

    def again() -> None: ...

    registry.register("a", object(), source=once)
    registry.register("a", object(), source=once)  # the same file, imported once more
    with pytest.raises(UsageError, match=r"thing 'a' is registered twice: .*once and .*again"):
        registry.register("a", object(), source=again)
    registry.remove("a")
    assert registry.names() == []
