"""Experiments on a real Ray cluster of two workers: same bytes as here, also if one is killed; `make test-ray`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.experiments.on_ray import require_address, slots_of
from kvscope.experiments.ray_pool import Slots, _reason

SPEC = """\
model: demo
tasks: ["needle:wording=notes"]
lengths: [128]
examples: 3
policies: [h2o, tova]
budgets: [20%]
seeds: [0, 1]
"""
OWN = """\
from dataclasses import dataclass
from kvscope import Policy

@dataclass(frozen=True)
class Broken(Policy):
    def observe(self, step, score):
        raise ValueError("no such key")
"""
Command = subprocess.Popen[str]
ENVIRONMENT = {  # a token, because others could run code on a cluster without one
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
}


@pytest.mark.parametrize(
    ("nodes", "threads", "device", "slots"),
    [
        ([{"CPU": 8.0}, {"CPU": 5.0}], 2, "auto", Slots(6, 2, 0)),
        ([{"CPU": 8.0}, {"CPU": 16.0}], 64, "auto", Slots(1, 16, 0)),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}], 64, "auto", Slots(10, 4, 1)),
        ([{"CPU": 64.0, "GPU": 8.0}], 2, "cuda", Slots(8, 2, 1)),
        ([{"CPU": 2.0, "GPU": 4.0}], 2, "cuda", Slots(4, 0, 1)),
        ([{"CPU": 64.0, "GPU": 8.0}], 16, "cpu", Slots(4, 16, 0)),
        ([{}, {"CPU": 4.0}], 1, "cpu", Slots(4, 1, 0)),
    ],
)
def test_room_for_workers(nodes: list[dict[str, float]], threads: int, device: str, slots: Slots) -> None:
    assert slots_of(nodes, threads, device) == slots


@pytest.mark.parametrize(
    ("nodes", "device", "what"),
    [
        ([{"CPU": 8.0, "GPU": 2.0}], "cuda:1", "device 'cuda:1' names one"),
        ([{"CPU": 8.0}], "cuda", "has no GPU"),
        ([{}], "cpu", "has no CPU"),
    ],
)
def test_no_room_for_workers(nodes: list[dict[str, float]], device: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        slots_of(nodes, 2, device)


def test_addresses() -> None:
    good = (None, "auto", "local", "10.0.0.1:6379", "head:6379", "[::1]:6379")
    assert [require_address(each) for each in good] == list(good)
    for wrong, todo in (("lokal", "Did you mean local?"), ("head", "HOST:PORT"), (":6379", ""), ("ray://a:1", "auto")):
        with pytest.raises(UsageError) as caught:
            require_address(wrong)
        assert todo in caught.value.todo, wrong


def test_the_reason_of_a_death_is_one_line() -> None:
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tpid: 921\n"
    died += "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR " + "more " * 60
    reason = _reason(RuntimeError(died))
    assert reason.startswith("its worker process has died. Worker exit type: SYSTEM_ERROR more")
    assert len(reason) <= 160 and reason.endswith("more ...")
    assert _reason(RuntimeError("first\nno node has room\n")) == "no node has room"
    assert _reason(RuntimeError()) == "RuntimeError"


def command(folder: Path, *arguments: str, **environment: str) -> Command:
    return subprocess.Popen(
        [sys.executable, "-m", "kvscope", "run", "exp.yaml", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    """Run the experiment of a folder; return what stderr said."""
    with command(folder, *arguments, **environment) as process:
        _, said = process.communicate(timeout=900)
    assert process.returncode == status, said
    return said


def place(folder: Path, spec: str) -> Path:
    folder.mkdir()
    (folder / "exp.yaml").write_text(spec)
    return folder


def test_an_unknown_place_is_refused(tmp_path: Path) -> None:
    assert "Did you mean ray?" in run(place(tmp_path / "a", SPEC), "--on", "rai", status=2)


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    folder = place(tmp_path / "a", SPEC)
    (folder / "ray.py").write_text("raise ModuleNotFoundError('No module', name='ray')")
    assert run(folder, "--on", "ray", status=2).splitlines() == [
        "error: an experiment on Ray needs the package ray",
        "Install it: pip install 'kvscope[ray]'",
    ]


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray installs it and runs these tests")


@pytest.fixture(scope="module")
def cluster(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster with room for two workers; tests end only the processes that they started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("r")
    script = "from ray.scripts.scripts import main; main()"
    arguments = f"start --head --block --num-cpus 2 --num-gpus 0 --node-ip-address 127.0.0.1 --port {port}"
    with (temporary / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments.split(), "--include-dashboard", "false"],
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + 120
    while "Ray runtime started" not in (temporary / "out").read_text():
        assert process.poll() is None and time.monotonic() < end, (temporary / "out").read_text()
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    process.terminate()  # ends the processes of the cluster too
    process.wait(60)


@pytest.fixture(scope="module")
def here(installed: None, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The summary of the experiment, made without Ray."""
    folder = place(tmp_path_factory.mktemp("here") / "a", SPEC)
    run(folder)
    return (folder / "reports" / "exp.json").read_bytes()


def writer(folder: Path, kind: str) -> int:
    """Return the process that is writing a trace or a replay, once there is one."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for file in folder.glob(f"{kind}/cells/*.incomplete/*.json"):
            try:
                return int(json.loads(file.read_text())["writer"]["pid"])
            except (OSError, ValueError, KeyError):
                continue
        time.sleep(0.005)
    raise AssertionError("no worker writes anything")


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".incomplete" or path.name.startswith(".seen")]


def test_summary_is_the_same_as_here(cluster: str, here: bytes, tmp_path: Path) -> None:
    folder = place(tmp_path / "a", SPEC)
    run(folder, "--on", "ray", RAY_ADDRESS=cluster)
    assert (folder / "reports" / "exp.json").read_bytes() == here and leftovers(folder) == []
    before = {file: file.stat().st_mtime_ns for file in (folder / "traces").rglob("*")}
    run(folder, "--on", "ray", RAY_ADDRESS=cluster)
    assert {file: file.stat().st_mtime_ns for file in (folder / "traces").rglob("*")} == before
    assert (folder / "reports" / "exp.json").read_bytes() == here


@pytest.mark.parametrize("kind", ["traces", "reports"])
def test_a_killed_worker_loses_nothing(cluster: str, here: bytes, tmp_path: Path, kind: str) -> None:
    folder = place(tmp_path / "a", SPEC)
    with command(folder, "--on", "ray", RAY_ADDRESS=cluster) as process:
        killed = writer(folder, kind)
        assert killed != process.pid
        os.kill(killed, signal.SIGKILL)
        _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert f"a worker died while it made the {'trace' if kind == 'traces' else 'replay'} of demo" in said
    assert (folder / "reports" / "exp.json").read_bytes() == here and leftovers(folder) == []


def test_what_fails_is_named_and_the_rest_is_kept_as_here(cluster: str, tmp_path: Path) -> None:
    spec = SPEC.replace("tova", "'own.py:Broken'").replace("[128]", "[128, 20]") + "prompts: []\n"
    folder = place(tmp_path / "a", spec)
    (folder / "own.py").write_text(OWN)
    summaries, said = [], []
    for on in ("local", "ray"):
        said.append(run(folder, "--on", on, status=1, RAY_ADDRESS=cluster))
        summaries.append((folder / "reports" / "exp.json").read_bytes())
        shutil.rmtree(folder / "traces")
        shutil.rmtree(folder / "reports")
    record = json.loads(summaries[0])
    assert summaries[0] == summaries[1] and said[0] == said[1]
    failed = {(failure["cell"], failure["what"]) for failure in record["failed"]}
    assert any("Broken at 20%: replay of demo" in cell and "ValueError: no such key" in what for cell, what in failed)
    assert ("replay of demo, needle:wording=notes 20, full prefill", "its trace could not be recorded") in failed
    assert {run["policy"] for run in record["runs"]} == {"h2o"}


def test_an_interruption_ends_everything_and_keeps_what_is_done(cluster: str, here: bytes, tmp_path: Path) -> None:
    folder = place(tmp_path / "a", SPEC)
    with command(folder, "--on", "ray", RAY_ADDRESS=cluster) as process:
        writer(folder, "reports")
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and said.startswith("error: interrupted"), said
    assert leftovers(folder) == [] and len(list(folder.glob("traces/cells/*/trace.json"))) >= 1
    run(folder, "--on", "ray", RAY_ADDRESS=cluster)
    assert (folder / "reports" / "exp.json").read_bytes() == here


def test_a_cluster_is_started_and_ended_for_the_command(here: bytes, tmp_path: Path) -> None:
    folder = place(tmp_path / "a", SPEC + "ray: local\n")
    run(folder)
    made, wanted = json.loads((folder / "reports" / "exp.json").read_text()), json.loads(here)
    assert made["spec"].pop("ray") == "local" and wanted["spec"].pop("ray") is None
    assert made.pop("sha256") != wanted.pop("sha256") and made == wanted


def test_no_cluster_is_two_lines(installed: None, tmp_path: Path) -> None:
    folder = place(tmp_path / "a", SPEC)
    said = run(folder, "--on", "ray", status=1, RAY_ADDRESS="127.0.0.1:9")
    assert said.startswith("error: no Ray cluster at 127.0.0.1:9: ") and len(said.splitlines()) == 2
    (tmp_path / "ray").mkdir()  # Ray notes here where its cluster is, and leaves the note when that ends
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    (folder / "exp.yaml").write_text(SPEC + "ray: auto\n")
    said = run(folder, status=1, RAY_TMPDIR=str(tmp_path))
    assert said.startswith("error: no Ray cluster on this machine: ") and len(said.splitlines()) == 2
