"""Benchmarks run with the package as it is; that of a GPU keeps the figures of a run that is cut or fails."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
SMALL = ["--device", "cpu", "--shape", "tiny", "--tokens", "16,48", "--traced", "24,4", "--rounds", "1"]


def figures_of(out: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *SMALL, "--out", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_every_section_is_measured(tmp_path: Path) -> None:
    found = figures_of(tmp_path / "gpu.json")
    assert found["complete"] and found["skipped"] == found["failed"] == []
    assert found["machine"]["device"] == "cpu" and found["machine"]["torch"]
    sections = {entry["label"]: entry["figures"] for entry in found["sections"]}
    assert list(sections) == [
        "decisions all",
        "stepping all 16",
        "stepping all 48",
        "closed loop tiny 16",
        "closed loop of eight tiny 16",
        "decoding tiny",
        "tracing tiny",
        "replaying tiny",
        "closed loop tiny 48",
        "closed loop of eight tiny 48",
    ]
    assert sections["decisions all"]["equal"] and sections["decisions all"]["runs_on_rows_with_ties"] > 20
    for tokens in (16, 48):
        steps = sections[f"stepping all {tokens}"]["microseconds_per_step"]
        assert all(steps[name]["median"] > 0 for name in ("h2o", "tova"))
        for name, runs in (("closed loop", 1), ("closed loop of eight", 8)):
            loop = sections[f"{name} tiny {tokens}"]
            assert loop["runs"] == runs
            assert all(loop["seconds"][kind]["median"] > 0 for kind in ("forward", "closed", "closed_metrics"))
            assert {"closed_over_forward", "closed_over_generate", "metrics_over_none"} <= set(loop["ratios"])
    assert [entry["tokens"] for entry in sections["decoding tiny"]["by_tokens"]] == [16, 48]
    assert {"maps_over_plain", "maps_over_eager", "qkv_over_plain", "qkv_over_eager"} <= set(
        sections["tracing tiny"]["ratios"]
    )
    assert set(sections["tracing tiny"]["extra_mib_over_plain"]) == {"plain", "eager", "maps", "qkv"}
    assert sections["replaying tiny"]["cpu_over_device"]["median"] > 0
    assert sections["replaying tiny"]["all_layers"]["layers"] == 2


def test_what_the_time_does_not_allow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sections import Measurement, Section  # type: ignore[import-not-found, unused-ignore]

    def slept(seconds: float) -> dict[str, Any]:
        time.sleep(0.2)
        return {"rounds": 3}

    sections = [Section("loop", "tiny", 100, 0.1, slept), Section("loop", "tiny", 10_000, 0.1, slept)]
    measurement = Measurement(tmp_path / "gpu.json", {}, 5)
    measurement.run([*sections, Section("other", "tiny", None, 99, slept)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["skipped"] == ["loop tiny 10000", "other tiny"] and not found["failed"] and found["complete"]
    assert [entry["status"] for entry in found["sections"]] == ["done", "skipped", "skipped"]
    # A warm-up and one of three rounds, half of what was measured, at a hundred times the tokens to the power of 1.5.
    assert found["sections"][1]["estimated_seconds"] == pytest.approx(0.2 / 2 * 1000, rel=0.2)
    assert found["sections"][2]["why"].endswith("seconds were left")


def test_a_failure_is_recorded_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from sections import Measurement, Section  # type: ignore[import-not-found, unused-ignore]

    out, seen = tmp_path / "gpu.json", []

    def fails(seconds: float) -> dict[str, Any]:
        seen.append(json.loads(out.read_text()))
        raise RuntimeError("CUDA error")

    sections = [
        Section("one", "tiny", 8, 0, lambda seconds: {"rounds": 1}),
        Section("two", "tiny", 8, 0, fails),
        Section("three", "tiny", 8, 0, lambda seconds: {"error": "differs"}),
        Section("four", "tiny", 8, 0, lambda seconds: {"value": 1}),
    ]
    measurement = Measurement(out, {"about": 1}, 60)
    measurement.run(sections)
    assert [entry["label"] for entry in seen[0]["sections"]] == ["one tiny 8"] and not seen[0]["complete"]
    found = json.loads(out.read_text())
    assert measurement.failed == found["failed"] == ["two tiny 8", "three tiny 8"]
    assert found["sections"][1]["error"] == "RuntimeError: CUDA error"
    assert found["sections"][3]["figures"] == {"value": 1} and found["complete"] and found["about"] == 1
    assert not list(tmp_path.glob("*.incomplete"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("belady", ["--runs", "1", "--longest", "256"]),
        ("gates", ["demo", "--questions", "1", "--passages", "1"]),
        ("host_time", ["--rounds", "1", "--tokens", "33"]),
        ("outcomes", ["--questions", "1", "--passages", "2", "--policies", "h2o", "tova", "window"]),
        ("policy_costs", ["--runs", "1", "--policy", "tova"]),
        ("replay_runs", ["--policies", "3", "--runs", "1"]),
        ("replay_speed", ["--runs", "1", "--lengths", "128"]),
        pytest.param("report_build", ["--lengths", "256"], marks=needs_chromium),
    ],
)
def test_other_benchmarks_run_with_the_package_as_it_is(script: str, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments, "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(out.read_text())["machine"]
