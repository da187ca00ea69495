"""Files that were made to harm, and policies that do what no policy should: two lines, and nothing else happens."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kvscope.core.newest import newest_first
from kvscope.model.fewest_tokens import fewest_tokens
from kvscope.results.store import open_replay
from tests.cli.conftest import Run, run  # noqa: F401  a fixture
from tests.gates.make import written
from tests.model.tiny import build
from tests.model.tokenizer_kinds import CORPUS, KINDS, make
from tests.trace.make import record

ROOT = Path(__file__).resolve().parents[1]
HUGE = 10 * 2**30
SIDE = 2**16  # attention of this many tokens in 16 bit has 8 GiB
MOST = 2**27  # bytes that a refusal may take


class Runs:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("unpickled"),)


def pickled_npy(path: Path) -> None:
    np.save(path, np.array([Runs()], dtype=object), allow_pickle=True)


def pickled_npz(path: Path) -> None:
    np.savez(path, attention=np.array([Runs()], dtype=object))


def pickled_torch(path: Path) -> None:
    torch.save({"attentions": Runs()}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs()))


def huge_npz(path: Path) -> None:
    """Write an archive whose directory declares 10 GB for its array, and whose array declares 8."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("attention.npy", "w") as member:
            about = {"descr": "<f2", "fortran_order": False, "shape": (1, 1, SIDE, SIDE)}
            np.lib.format.write_array_header_1_0(member, about)
            member.write(bytes(1000))
        archive.filelist[0].file_size = HUGE


def lying_safetensors(path: Path) -> None:
    tensors = {"attention": {"dtype": "F16", "shape": [1, 1, SIDE, SIDE], "data_offsets": [0, SIDE * SIDE * 2]}}
    text = json.dumps(tensors | {"__metadata__": {"kvscope-gate": "{}"}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{" + bytes(1000))


def huge_tar(path: Path) -> None:
    """Write a packed file whose first member declares 10 GB."""
    import tarfile

    member = tarfile.TarInfo("trace.json")
    member.size = HUGE
    path.write_bytes(member.tobuf() + bytes(1024))


FILES: dict[str, Callable[[Path], None]] = {
    "pickled.npy": pickled_npy,
    "pickled.npz": pickled_npz,
    "pickled.pt": pickled_torch,
    "plain.npy": plain_pickle,
    "plain.pt": plain_pickle,
    "huge.npz": huge_npz,
    "lying.safetensors": lying_safetensors,
    "endless.safetensors": endless_header,
}


@pytest.fixture
def trace(run: Run) -> Path:  # noqa: F811
    record(Path("traces/t"), lengths=[24], prompt=10)
    return Path("traces/t")


@pytest.fixture
def little() -> object:
    """Yield while the memory that Python and NumPy take is counted; it stays below `MOST`."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST, f"{peak / 2**20:.0f} MiB were taken"


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_capture_is_two_lines(name: str, run: Run, little: None) -> None:  # noqa: F811
    FILES[name](Path(name))
    what, _ = run("import", name, "--prompt-length", "2", "-o", "made").two_lines()
    assert name in what
    assert not Path("unpickled").exists() and not Path("traces/made").exists()


@pytest.mark.parametrize("name", ["plain.pt", "pickled.pt", "lying.safetensors", "endless.safetensors"])
def test_a_hostile_gate_is_two_lines(name: str, run: Run, trace: Path, little: None) -> None:  # noqa: F811
    FILES[name](Path(name))
    what, _ = run("replay", trace, "-p", f"attention-gate:gate={name}", "-q").two_lines()
    assert name in what
    assert not Path("unpickled").exists() and not list(Path("reports").glob("*"))


def test_a_packed_file_that_declares_much_is_two_lines(run: Run, little: None) -> None:  # noqa: F811
    huge_tar(Path("huge.tar"))
    what, _ = run("unpack", "huge.tar").two_lines()
    assert "huge.tar" in what
    assert not list(Path().rglob("trace.json"))


def test_a_prompt_that_becomes_huge_is_two_lines(run: Run, little: None) -> None:  # noqa: F811
    with gzip.open("bomb.txt.gz", "wb") as file:
        for _ in range(72):
            file.write(bytes([32]) * 2**20)
    what, _ = run("trace", "--model", "demo", "bomb.txt.gz", "-q").two_lines()
    assert "bomb.txt.gz is not a text: decompressed" in what


def test_a_gate_of_another_model_is_two_lines(run: Run) -> None:  # noqa: F811
    shutil.copytree(ROOT / "traces" / "example", "traces/e")
    what, _ = run("replay", "e", "-p", f"attention-gate:gate={written(Path(), build('llama'))}", "-q").two_lines()
    assert "gate" in what
    assert not list(Path("reports").glob("*"))


# --- policies

HEAD = """
import time
from dataclasses import dataclass
import torch
from kvscope import Policy
from kvscope.policies.base import Recurrence

@dataclass(frozen=True)
class Own(Policy):
    "Retain something. More."
    needs = frozenset({"weights", "full_weights", "value_l1", "key_l2", "mean_query"})

"""
WRITES = {
    "live": "step.live.zero_()",
    "full weights": "step.signals['full_weights'].zero_()",
    "signals": "[signal.fill_(7) for signal in step.signals.values()]",
    "visible": "step.visible.fill_(True)",
    "budget": "step.budget.fill_(1000); step.budgets[:] = [1000]",
    "layers": "step.layers.fill_(9)",
    "draws": "step.draw(3).zero_(); step.draw_row(3).zero_()",
    "through NumPy": "step.live.numpy()[...] = 0; step.signals['value_l1'].numpy()[...] = 5",
    "kept": "step.memory.setdefault('kept', []).append(step.live); step.memory['kept'][0].zero_()",
    "signals removed": "step.signals.clear()",
}
OTHERS = ["h2o", "tova", "vatp", "random", "key-norm", "belady"]


def own(body: str, more: str = "") -> str:
    """Write a policy into a new file, since each is read once, and return its name."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    file = Path(f"own{len(list(Path().glob('own*.py')))}.py")
    file.write_text(f"{HEAD}    def observe(self, step, score):\n{lines}{more}".lstrip("\n"))
    return f"{file}:Own"


def replayed(run: Run, trace: Path, *policies: str, budget: str = "5") -> dict[str, pd.DataFrame]:  # noqa: F811
    """Return the fidelity and the residency of every policy in one replay."""
    given = [part for name in policies for part in ("-p", name)]
    done = run("replay", trace, *given, "-b", budget, "-o", "made", "--force", "-q")
    assert done.status == 0, done.err
    replay = open_replay(Path("reports/made"))
    frames = {"fidelity": replay.fidelity(), "residency": replay.residency()}
    found = {}
    for info in replay.info.runs:
        for name, frame in frames.items():
            own = frame[frame["run"] == info.run].drop(columns="run").reset_index(drop=True)
            found[f"{info.label} {info.budget} {name}"] = own
    return found


# Before the first eviction all budgets share one row, and torch refuses to write into it.
SHARED = ("live", "kept", "through NumPy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "budget"), [(name, "5") for name in WRITES] + [(name, "5,8") for name in WRITES if name not in SHARED]
)
def test_what_a_policy_writes_reaches_no_other(name: str, budget: str, run: Run, trace: Path) -> None:  # noqa: F811
    """Rows and signals are shared by all policies of a replay, and read again for the metrics."""
    harmless = replayed(run, trace, own("return score + step.t"), *OTHERS, budget=budget)
    written = replayed(run, trace, own(f"{WRITES[name]}\nreturn score + step.t"), *OTHERS, budget=budget)
    assert harmless.keys() == written.keys()
    for name, frame in harmless.items():
        pd.testing.assert_frame_equal(frame, written[name], check_exact=True)


@pytest.mark.parametrize("writes", ["keys.positions.zero_()", "[one.zero_() for one in keys.signals.values()]"])
def test_what_a_fixed_score_writes_reaches_no_other(writes: str, run: Run, trace: Path) -> None:  # noqa: F811
    body = """
    needs = frozenset({"value_l1", "key_l2"})

    def fixed(self, keys):
        made = keys.positions * 1.0
        WRITES
        return made

    def recurrence(self):
        return Recurrence("none", fixed=self.fixed)
"""
    found = []
    for line in ("pass", writes):
        found.append(replayed(run, trace, own("return score", body.replace("WRITES", line)), *OTHERS))
    for name, frame in found[0].items():
        pd.testing.assert_frame_equal(frame, found[1][name], check_exact=True)


FAULTS = {
    "return score * float('nan')": "scores that are not numbers",
    "return score[..., 1:]": "your policy",
    "raise ValueError('\\x1b[31mred\\n::error::x')": "ValueError: ",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_policy_with_a_fault_is_two_lines(body: str, run: Run, trace: Path) -> None:  # noqa: F811
    done = run("replay", trace, "-p", own(body), "-p", "h2o", "-b", "5", "-q")
    what, _ = done.two_lines()
    assert FAULTS[body] in what and "\x1b" not in done.err
    assert not list(Path("reports").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("body", ["while True: pass", "time.sleep(1000)", "while True: torch.ones(9).sum()"])
def test_a_policy_that_never_returns_can_be_interrupted(body: str, run: Run, trace: Path) -> None:  # noqa: F811
    name = own(f"open('begun', 'w').close()\n{body}")
    command = [sys.executable, "-m", "kvscope", "replay", str(trace), "-p", name, "-p", "h2o", "-b", "5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if Path("begun").exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-2:] == [
        "error: interrupted",
        "Incomplete output was removed; older output is unchanged.",
    ]
    assert "Traceback" not in said and not list(Path("reports").glob("*"))


# --- many replays, long prompts


def test_the_newest_of_a_thousand_replays(tmp_path: Path) -> None:
    text = (ROOT / "reports" / "example" / "run.json").read_text()
    data = json.loads(text)
    for number in range(1000):
        folder = tmp_path / f"r{number}"
        folder.mkdir()
        data["created"] = f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00"
        (folder / "run.json").write_text(json.dumps(data))
    opened = 0
    counting = True

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal opened
        opened += counting and event == "open" and str(arguments[0]).startswith(str(tmp_path))

    sys.addaudithook(count)  # for ever, so that it must cost nothing later
    begun = time.process_time()
    assert next(newest_first(tmp_path, "run.json")).name == "r999"
    spent = time.process_time() - begun
    counting = False
    assert opened == 1000, "each header is opened once, and no table"
    assert spent < 1, f"{spent:.2f} s of processor time"


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_its_bound(kind: str) -> None:
    tokenizer = make(kind)
    for text in (*CORPUS, "", " " * 1000, "the house " * 99, "</s>" * 50, "\n\n\n", "世界🙂" * 20, "\x00\x7f"):
        assert fewest_tokens(tokenizer, text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (fewest_tokens(tokenizer, "the house " * 99) > 20) == (kind == "byte-level")


def test_a_prompt_of_ten_megabytes_is_refused_before_it_is_encoded(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To encode it takes 20 s and 2 GB."""
    from kvscope.model.token_ids import TextEncoder

    Path("long.txt").write_text("The keeper lit the lamp every night. " * (10_000_000 // 37))
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("the prompt was encoded"))
    what, todo = run("trace", "--model", "demo", "long.txt", "-q").two_lines()
    assert "long.txt has 9999990 characters, so at least " in what and "context of" in what
    assert todo == "Shorten the prompt."
