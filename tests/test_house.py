"""The layout of the package: who may import whom, what loads when, and what is documented.

Each test prevents a silent drift: a room that starts to know another, a heavy library that creeps into start-up, a
print below the command line, a public function that nobody explained.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvscope"

# Room -> the rooms that it may import, besides itself. `core` imports none, and every room may import it.
ENGINE = {"core", "gates", "kernels", "metrics", "policies", "quantisation", "trace"}
LOOPS = ENGINE | {"engine", "results"}
MAY_IMPORT = {
    "__init__": {
        "analysis",
        "closed_loop",
        "core",
        "metrics",
        "model",
        "policies",
        "replay",
        "report",
        "results",
        "sharing",
        "trace",
    }
    | {"tracking"},
    "__main__": {"cli"},
    "core": set(),
    "trace": {"core"},
    "kernels": {"core"},
    "gates": {"core"},
    "quantisation": {"core"},
    "merging": {"core"},
    "policies": {"core", "gates"},
    "metrics": {"core", "kernels"},
    "model": {"core", "kernels", "trace"},
    "engine": ENGINE,
    "bounds": {"core", "engine", "policies"},
    "results": {"core"},
    "presses": {"core", "model", "policies"},
    "closed_loop": LOOPS | {"merging", "model", "presses", "tasks"},
    "replay": LOOPS | {"bounds", "closed_loop", "presses"},
    "tune": LOOPS | {"replay"},
    "tasks": {"core"},
    "experiments": LOOPS | {"closed_loop", "model", "replay", "tasks"},
    "training": {"core", "gates", "kernels", "model", "trace"},
    "analysis": {"core", "results", "trace"},
    "report": {"core", "results", "trace"},
    "sharing": {"core", "results", "trace"},
    "tracking": {"core", "results"},
    "cli": {
        *("analysis", "closed_loop", "core", "engine", "experiments", "gates", "kernels", "metrics", "model"),
        *(
            "policies",
            "presses",
            "replay",
            "report",
            "results",
            "sharing",
            "tasks",
            "trace",
            "tracking",
            "training",
            "tune",
        ),
    },
}

# Library -> the only rooms that may import it.
ONLY_IN = {
    "plotly": {"report"},
    "matplotlib": {"report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "transformers": {"model"},
    "tokenizers": {"model"},
    "accelerate": {"model"},
    "kvpress": {"presses"},
    "numba": {"kernels"},
    "fsspec": {"sharing"},
    "yaml": {"experiments"},
    "ray": {"experiments"},
    "triton": {"kernels"},
    "wandb": {"tracking"},
    "mlflow": {"tracking"},
    "tensorboard": {"tracking"},
    "torch": {
        *("bounds", "cli", "closed_loop", "engine", "gates", "kernels", "metrics"),
        *("merging", "model", "policies", "presses", "quantisation", "replay", "training", "tune"),
        "tracking",  # its SummaryWriter
        "trace",  # only to read captured attention that torch saved: see test_traces_load_no_torch
    },
}

# What a command may import at its top: it loads nothing but the standard library.
LIGHT = (
    "errors",
    "gate_options",
    "memory",
    "options",
    "output",
    "printable",
    "own_code",
    "recording_options",
    "registry",
    "trackers",
    "version",
)
HEAVY = ("numba", "triton", "torch", "plotly", "matplotlib", "transformers", "pandas", "pyarrow", "numpy")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yield every module that a file imports, wherever in the file, with absolute names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield node.module or "", node
            if node.module == "kvscope":
                yield from ((f"kvscope.{alias.name}", node) for alias in node.names)


def at_top(file: Path) -> set[str]:
    """Return the modules imported when the file is, without those for type checkers."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_room_is_in_the_table() -> None:
    assert {room(file) for file in files()} <= set(MAY_IMPORT), "a new room needs a row in MAY_IMPORT"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_who_may_import_whom(file: Path) -> None:
    own = room(file)
    for module, node in imports(file):
        where = f"{file.relative_to(PACKAGE)}:{node.lineno} imports {module}"
        library, _, rest = module.partition(".")
        if library == "kvscope":
            other = rest.partition(".")[0]
            assert other in MAY_IMPORT[own] | {own}, where
        elif library in ONLY_IN:
            assert own in ONLY_IN[library], where


def modules() -> dict[str, set[str]]:
    """Return for each module of the package those that it imports, in functions and for type checkers too."""
    known = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in files()}
    known = {name.removesuffix(".__init__"): file for name, file in known.items()}
    found: dict[str, set[str]] = {}
    for name, file in known.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= inside & set(known) or {node.module}
        found[name] = (imported & set(known)) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle; none where they can be put in an order."""
    waiting = {name: set(imported) for name, imported in graph.items()}
    while ready := {name for name, imported in waiting.items() if not imported}:
        waiting = {name: imported - ready for name, imported in waiting.items() if name not in ready}
    return sorted(waiting)


def test_no_modules_import_each_other() -> None:
    assert circle(modules()) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"], "the check sees a circle"


def test_policies_and_metrics_know_only_their_base() -> None:
    for own in ("policies", "metrics"):
        for file in (PACKAGE / own).glob("*.py"):
            if file.name in ("__init__.py", "base.py", "spec.py"):
                continue
            inside = {
                module
                for module, _ in imports(file)
                if module.startswith("kvscope.")
                and module not in ("kvscope.core.errors", "kvscope.core.latex", "kvscope.core.seal")
            }
            siblings = {f"kvscope.{own}.{other.stem}" for other in (PACKAGE / own).glob("*.py")}
            kernels = {module for module in inside if module.split(".")[1] == "kernels"}  # compiled forms
            assert inside - kernels <= {f"kvscope.{own}.base"} | siblings, f"{file.name} imports {inside}"


def test_report_never_sees_a_policy_class() -> None:
    for file in (PACKAGE / "report").rglob("*.py"):
        for module, node in imports(file):
            assert not module.startswith(("kvscope.policies", "kvscope.metrics")), f"{file}:{node.lineno}"


def test_commands_import_the_rooms_inside_their_functions() -> None:
    light = {"kvscope.cli", *(f"kvscope.core.{name}" for name in LIGHT)}
    for file in (PACKAGE / "cli").glob("*.py"):
        for module in at_top(file):
            if module.startswith("kvscope") and not module.startswith("kvscope.cli."):
                assert module in light, f"{file.name} imports {module} at its top"
            assert module.partition(".")[0] not in HEAVY, f"{file.name} imports {module} at its top"


def test_nothing_below_the_command_line_prints_or_exits() -> None:
    for file in files():
        if room(file) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "input", "exit", "quit", "sys.exit", "os._exit"), f"{file}:{node.lineno}"
            assert not called.startswith(("sys.stdout.", "sys.stderr.")), f"{file}:{node.lineno}"


def test_no_error_is_swallowed() -> None:
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                where = f"{file.relative_to(PACKAGE)}:{node.lineno}"
                assert node.type is not None, f"{where}: bare except"
                assert not all(isinstance(line, ast.Pass) for line in node.body), f"{where}: except and pass"


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_things_are_documented(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), f"{file} says nothing about itself"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{file}:{node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                # a method that redefines a documented one of its base, as `observe` of a policy, need not repeat it
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and not node.bases:
                    assert ast.get_docstring(part), f"{file}:{part.lineno}: {node.name}.{part.name}"


def functions() -> list[tuple[int, str]]:
    """Return the number of lines of every function of the package, docstring included, and where it is."""
    return [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}")
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]


def test_no_function_outgrows_its_reader() -> None:
    found = sorted(functions())
    assert [where for lines, where in found if lines > 60] == []
    assert found[len(found) * 9 // 10][0] <= 25, "nine of ten functions have at most 25 lines"


def test_no_file_outgrows_its_reader() -> None:
    long = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in files()}
    long = {name: lines for name, lines in long.items() if lines > 300}
    assert len(long) <= 3 and all(lines <= 340 for lines in long.values()), long


def test_types_are_said() -> None:
    """`Any` is for what has no type: objects of transformers, columns of tables, arguments of compiled loops."""
    lines = [line for file in files() for line in file.read_text().splitlines() if re.search(r"\bAny\b", line)]
    assert len(lines) <= 120


def loaded_after(code: str) -> set[str]:
    """Return which of the heavy libraries are loaded after `code`, in a fresh interpreter."""
    ask = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded_after("import kvscope; kvscope.__version__; dir(kvscope)") == set()


def test_the_open_loop_does_not_load_transformers() -> None:
    """It takes seconds, and a replay of a trace needs no model."""
    example = PACKAGE.parent / "traces" / "example"
    code = f"import kvscope; kvscope.replay(kvscope.open({str(example)!r}), ['h2o', 'snapkv'], 0.2)"
    assert not loaded_after(code) & {"transformers", "plotly", "triton"}


def test_help_loads_nothing_heavy() -> None:
    assert loaded_after("from kvscope.cli.app import run; run(['--help'])") == set()


def test_version_loads_nothing_heavy() -> None:
    assert loaded_after("from kvscope.cli.app import run; run(['--version'])") == set()


def test_traces_load_no_torch() -> None:
    code = "import kvscope.trace.importer, kvscope.trace.import_files, kvscope.trace.reader, kvscope.trace.writer"
    assert "torch" not in loaded_after(code)


def test_the_probe_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_every_public_name_loads() -> None:
    import kvscope

    for name in kvscope.__all__:
        assert getattr(kvscope, name) is not None
    assert set(kvscope._PUBLIC) | set(kvscope._ROOMS) | {"__version__"} == set(kvscope.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kvscope.nothing


@pytest.mark.parametrize("name", ["trace", "replay", "report", "policies"])
def test_a_room_is_also_the_function_it_is_named_after(name: str) -> None:
    import kvscope

    importlib.import_module(f"kvscope.{name}")
    called = getattr(kvscope, name)
    assert callable(called)
    place, _, function = kvscope._ROOMS[name].partition(":")
    defined = getattr(importlib.import_module(place), function)
    assert inspect.signature(called) == inspect.signature(defined)
    assert called.__doc__ == defined.__doc__, "help shows how to call it"
    with pytest.raises(TypeError):
        called(no_such_argument=1)
