"""The command line in an empty folder, and small things to feed it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kvscope.cli.app import run as run_command

LENGTH, PROMPT = 24, 12


@dataclass
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    def two_lines(self) -> tuple[str, str]:
        """Return the error, which is the last two lines of stderr and nothing like a traceback."""
        assert "Traceback" not in self.err
        lines = self.err.rstrip("\n").split("\n")
        assert len(lines) >= 2, self.err
        what, todo = lines[-2:]
        assert what.startswith("error: "), self.err
        assert what.removeprefix("error: ").strip(), self.err
        assert todo.strip(), f"nothing says what to do: {self.err}"
        assert sum(line.startswith("error: ") for line in lines) == 1, self.err
        return what.removeprefix("error: "), todo


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def go(*arguments: str | Path) -> Result:
        capsys.readouterr()
        status = run_command([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(status, out, err)

    return go


def maps(length: int = LENGTH, layers: int = 2, heads: int = 4, seed: int = 0) -> np.ndarray:
    """Return random causal attention ``[L, H, T, T]`` with rows that sum to one."""
    logits = np.random.default_rng(seed).normal(size=(layers, heads, length, length)).astype(np.float32) * 2
    weights = np.exp(logits) * np.tril(np.ones((length, length), np.float32))
    return weights / weights.sum(-1, keepdims=True)


def quietly(*arguments: str | Path) -> None:
    """Run a command that must succeed, for what several tests use."""
    assert run_command([*(str(argument) for argument in arguments), "--quiet"]) == 0, arguments


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Attention maps captured elsewhere."""
    path = tmp_path / "maps.npz"
    np.savez(path, attention=maps())
    return path


@pytest.fixture
def small(run: Run, npz: Path) -> Path:
    """A small whole trace, ``traces/small``."""
    done = run("import", npz, "--prompt-length", str(PROMPT), "-o", "small", "--quiet")
    assert done.status == 0, done.err
    return Path("traces/small")
