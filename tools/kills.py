"""Stop commands at random moments: nothing unfinished is taken for a result, and the next run needs no help.

python tools/kills.py [--seed N] [--scale X] [--out FILE]

Each command is first run once without being stopped. Then it is stopped by SIGKILL, SIGTERM or SIGINT after a random
part of that time, once into an empty folder and once over an older output with --force, by turns. After that

- what has the output's name must be whole and verified: the new result, or with --force the older one;
- an interruption (SIGINT) must print two lines and no traceback;
- the same command, run again, must succeed, and leave neither unfinished nor older output behind.

Commands run in children of one process that has loaded their libraries, so that the moments lie in the work and not in
imports; every tenth runs as a process of its own. The exit status is 1 if anything was accepted, lost or left behind.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OWN_PROCESS = 10  # one of so many runs pays for its imports
FIRST = ["--seed", "1"]  # of an older output that --force replaces
TRAIN = "gate train --model demo --text text.txt --steps 6 --every 2 --window 64 -o gate.safetensors"


@dataclass(frozen=True)
class Case:
    """A command that is stopped.

    Attributes
    ----------
    name : str
        Of the row in the table.
    count : int
        How often it is stopped at scale 1.
    new, old : list of str
        Arguments, and those that make the older output.
    output : str
        Path of its output.
    identity : callable
        Returns what the output is; raises if it is not whole.
    """

    name: str
    count: int
    new: list[str]
    old: list[str]
    output: str
    identity: Callable[[Path], str]


def cases() -> list[Case]:
    """Return the commands."""
    trace = "trace --model demo prompt.txt --max-new-tokens 24 -o kept"
    replay = "replay source -p h2o -p tova --budget 20% -o kept"
    losses = "perplexity --model demo text.txt -p h2o --budget 20% -o kept"
    return [
        Case("trace", 100, trace.split(), trace.replace("24", "4").split(), "traces/kept", identity_of_trace),
        Case("replay", 50, replay.split(), replay.replace("20%", "40%").split(), "reports/kept", decisions_of_replay),
        Case("report", 20, _report("first"), _report("second"), "reports/page.html", content_of_page),
        Case("gate train", 20, TRAIN.split(), TRAIN.split() + FIRST, "gate.safetensors", content_of_gate),
        Case("perplexity", 20, losses.split(), losses.replace("20%", "40%").split(), "reports/kept", losses_of_replay),
    ]


def _report(replay: str) -> list[str]:
    return ["report", replay, "-o", "page"]


def identity_of_trace(path: Path) -> str:
    """Return the identity of a verified trace."""
    from kvscope.trace.reader import open_trace

    return open_trace(path, verify=True).identity


def decisions_of_replay(path: Path) -> str:
    """Return the digests of the decisions of a verified replay."""
    from kvscope.results.store import open_replay

    return json.dumps([run.decisions for run in open_replay(path, verify=True).info.runs])


def losses_of_replay(path: Path) -> str:
    """Return the losses of a verified replay."""
    from kvscope.results.store import open_replay

    replay = open_replay(path, verify=True)
    return decisions_of_replay(path) + str(replay.tokens(replay.info.runs[0].run).sum().to_dict())


def content_of_page(path: Path) -> str:
    """Return the name of the replay that a whole page shows."""
    text = path.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>"), "the page is cut"
    return "second" if "second" in text else "first"


def content_of_gate(path: Path) -> str:
    """Return the bytes of a gate that can be loaded."""
    from kvscope.gates.module import load_gate

    load_gate(str(path))
    return path.read_bytes().hex()


def command(arguments: list[str], stop: tuple[float, signal.Signals] | None, own: bool, log: Path) -> int:
    """Return the status of a command, which is sent a signal after some seconds; negative if a signal ended it."""
    if own:
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "kvscope", *arguments],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            ],
            setsigdef=[signal.SIGINT],
        )
    else:
        child = os.fork()
        if child == 0:
            run_child(arguments, log)
    if stop is not None:
        time.sleep(stop[0])
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, stop[1])
        else:
            return 0  # it was complete before the signal
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_child(arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> None:
    """Run a command in this child, in which `before` is called first, and end it."""
    status = 99
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    try:
        for number, path in ((1, os.devnull), (2, str(log))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        before()
        from kvscope.cli.app import prepare_process, run

        prepare_process()
        status = run(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def stopped(case: Case, known: tuple[str, str], seconds: float, number: int, draw: random.Random, log: Path) -> str:
    """Stop a command once and run it again, and return what was found."""
    output, older, own = Path(case.output), number % 2 == 1, number % OWN_PROCESS == OWN_PROCESS - 1
    _remove(output)
    if older and command(case.old, None, False, log):
        return "the older output cannot be made"
    sent = draw.choice(SIGNALS)
    after = draw.random() * (seconds + (4 if own else 0))
    status = command([*case.new, *(["--force"] if older else [])], (after, sent), own, log)
    said = log.read_text(errors="replace")
    if "Traceback" in said:
        return f"traceback after {sent.name}: {said[said.index('Traceback') :]}"
    try:
        found = case.identity(output) if output.exists() else None
    except Exception as error:  # a broken output is a finding, whatever broke
        return f"WRONG: an output that is not whole has the name: {error}"
    if found is not None and found not in known:
        return "WRONG: an output that is neither the new one nor the older one has the name"
    if status == 0 and found != known[0]:
        return "WRONG: the command succeeded without its output"
    aside = output.with_name(output.name + ".replaced")
    if older and found is None and not aside.exists():
        return "LOST: neither the older nor the new output is there"
    again = case.new if found is None and not aside.exists() else [*case.new, "--force"]
    if command(again, None, False, log):
        return f"the next run failed: {log.read_text(errors='replace').splitlines()[0]}"
    if case.identity(output) != known[0]:
        return "WRONG: the next run gave another result"
    left = [item.name for item in output.parent.glob(output.name + ".*") if not item.name.endswith(".checkpoint")]
    return f"left behind: {', '.join(left)}" if left else ("completed" if status == 0 else f"{sent.name}, no harm")


def _remove(output: Path) -> None:
    for path in (output, *output.parent.glob(output.name + ".*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def preload() -> None:
    """Import in this process what the commands import, so that their children need not."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    for room in ("closed_loop", "model", "replay", "report", "training"):
        package = importlib.import_module(f"kvscope.{room}")
        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"kvscope.{room}.{found.name}")


def prepare() -> None:
    """Make prompt, text, a trace and two replays in the current folder."""
    from kvscope.cli.app import run

    text = (ROOT / "traces" / "example.txt").read_text(encoding="utf-8")
    Path("prompt.txt").write_text(text, encoding="utf-8")
    Path("text.txt").write_text(text * 12, encoding="utf-8")
    shutil.copytree(ROOT / "traces" / "example", "traces/source")
    for name, budget in (("first", "20%"), ("second", "40%")):
        if run(["replay", "source", "-p", "h2o", "--budget", budget, "-o", name, "-q"]):
            raise SystemExit("the replays cannot be made")


def campaign(seed: int, scale: float, log: Path) -> dict[str, Counter[str]]:
    """Return for each command how often each outcome was found."""
    found: dict[str, Counter[str]] = {}
    for case in cases():
        draw = random.Random(f"{seed} {case.name}")
        identities = []
        for arguments in (case.old, case.new):
            _remove(Path(case.output))
            began = time.monotonic()
            if command(arguments, None, False, log):
                raise SystemExit(f"kvscope {' '.join(arguments)} fails: {log.read_text()}")
            seconds = time.monotonic() - began
            identities.append(case.identity(Path(case.output)))
        known = (identities[1], identities[0])
        outcomes = (
            stopped(case, known, seconds, number, draw, log) for number in range(max(1, round(case.count * scale)))
        )
        found[case.name] = Counter(outcomes)
        print(f"{case.name:12} {seconds:5.1f} s  {dict(found[case.name])}", flush=True)
    return found


def main() -> int:
    """Run the campaign, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 210 runs")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a child of a process with threads would wait for them
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, str(ROOT))
    out = given.out.resolve() if given.out else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        preload()
        prepare()
        found = campaign(given.seed, given.scale, Path(folder) / "stderr.txt")
        os.chdir(ROOT)
    harmless = ("completed", *(f"{each.name}, no harm" for each in SIGNALS))
    bad = sum(count for counts in found.values() for outcome, count in counts.items() if outcome not in harmless)
    if out is not None:
        about = {"seed": given.seed, "commands": {name: dict(counts) for name, counts in found.items()}, "bad": bad}
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(map(sum, (counts.values() for counts in found.values())))} stopped, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
