"""Check that decisions and tests are the same on other processors: vector units, BLAS kernels, numbers of threads.

python tools/portable.py [TRACE ...]

Every policy is replayed with both prefills and three budgets over the example, and over a trace of the same prompt
whose rows are recomputed from queries and keys; or over the given traces. Each of `SETTINGS` needs a process of its
own, because libraries read these variables when they are loaded. A table shows for each policy the settings whose
decisions differ from those of the first. Without TRACE, the tests that compare computed floats with files, or two
computations with each other, are then run under the settings of `TESTED`. The exit status is 0 if there is no
difference and no failure.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from numpy.__config__ import CONFIG

ROOT = Path(__file__).resolve().parent.parent
FOUND = [name for name in CONFIG["SIMD Extensions"]["found"] if name.startswith(("X86_V", "AVX"))]
NO_512 = [name for name in FOUND if name != "X86_V3"]
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "no AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": " ".join(FOUND),
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "NUMBA_CPU_NAME": "generic",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": " ".join(NO_512),
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "Nehalem, no kernels": {"OPENBLAS_CORETYPE": "Nehalem", "MKL_CBWR": "COMPATIBLE", "KVSCOPE_NO_KERNELS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
RECORD = "trace --model demo traces/example.txt --max-new-tokens 16 --store qkv --dtype bfloat16"
BUDGETS = "10%,20%,40%"
# Besides all policies with their defaults: parameters that make them decide more often, or from more sums.
FULL = ("all", "lagkv:lag=8", "quest:page_size=4,skip_layers=0", "a2sf:alpha=0.9,group=max", "vatp:base=tova")
STREAM = ("all", "quest:page_size=4,skip_layers=0", "scissorhands:history=16", "morphkv:window=8,fuse=sum")
REPLAYS = (
    ("full", "", FULL),
    ("stream", "", STREAM),
    ("full", "--compress every:8", ("r-kv", "keydiff", "lagkv:lag=8")),
    ("full", "--allocate ada", ("h2o", "snapkv")),
    ("full", "--allocate cake", ("h2o", "snapkv")),
)
TESTED = ("no AVX", "AVX2")
TESTS = (
    "tests/test_examples.py",
    "tests/trace/test_derive.py",
    "tests/engine/test_golden.py",
    "tests/model/test_qkv.py",
    "tests/cli/test_snapshots.py",
)
Digests = dict[str, str]  # what was replayed -> digest of its decisions


def main(traces: list[str]) -> int:
    """Return 0 where all decisions are the same and all tests pass, and 1 otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        over = traces or [str(ROOT / "traces" / "example"), str(Path(folder) / "qkv")]
        if not traces:
            command(f"{RECORD} --output {over[1]}", {})
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process with one thread
            found = dict(zip(SETTINGS, pool.map(lambda one: decisions(over, one), SETTINGS.values()), strict=True))
    status = show(found)
    return status if traces or status else test()


def test() -> int:
    """Return 0 if the sensitive tests pass under each setting of `TESTED`."""
    for name in TESTED:
        print(f"{name}: {shlex.join(TESTS)}", flush=True)
        words = [sys.executable, "-m", "pytest", "-q", *TESTS]
        if subprocess.run(words, env=environment(SETTINGS[name]), cwd=ROOT, check=False).returncode:
            return 1
    return 0


def environment(setting: dict[str, str]) -> dict[str, str]:
    """Return the variables of a process in which a setting holds."""
    return {"OMP_NUM_THREADS": "1", **os.environ, **setting}


def command(line: str, setting: dict[str, str]) -> None:
    """Run a command of kvscope in a process of its own, in which a setting holds."""
    words = [sys.executable, "-m", "kvscope", *shlex.split(line), "--quiet"]
    done = subprocess.run(words, env=environment(setting), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"kvscope {line}\n{done.stderr}")


def decisions(traces: list[str], setting: dict[str, str]) -> Digests:
    """Return the digest of every run under a setting, by prefill, options, policy, budget and trace."""
    found: Digests = {}
    for trace in traces:
        for prefill, options, policies in REPLAYS:
            named = " ".join(f"--policy {shlex.quote(policy)}" for policy in policies)
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "replay"
                line = f"replay {shlex.quote(trace)} {named} --budget {BUDGETS} --prefill {prefill} {options}"
                command(f"{line} --output {output}", setting)
                runs = json.loads((output / "run.json").read_text(encoding="utf-8"))["runs"]
            for run in runs:
                what = f"{run['label']} {options}".strip()
                found[f"{what}|{prefill}|{run['budget']}|{Path(trace).name}"] = run["decisions"]
    return found


def show(found: dict[str, Digests]) -> int:
    """Print a line for each policy: runs that differ from those of the first setting; return 1 if any does."""
    first = next(iter(found.values()))
    policies = list(dict.fromkeys(name.split("|")[0] for name in first))
    print(f"{'runs whose decisions differ':44s}" + "".join(f"{name:>22s}" for name in found))
    differ = 0
    for policy in policies:
        own = [name for name in first if name.split("|")[0] == policy]
        counts = [sum(digests.get(name) != first[name] for name in own) for digests in found.values()]
        print(f"{policy:44s}" + "".join(f"{f'{count} of {len(own)}':>22s}" for count in counts))
        differ += sum(counts)
    for setting, digests in found.items():
        for name in first:
            if digests.get(name) != first[name]:
                print(f"differs with {setting}: {name}")
    print(f"portable: {differ} of {len(first) * (len(found) - 1)} decisions differ" if differ else "portable: fine")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
