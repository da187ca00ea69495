"""Run every command that writes where it cannot: full disks, folders without permission, odd names and streams.

python tools/surroundings.py [--seed N] [--scale X] [--only NAME] [--out FILE]

Each command is first run once where nothing is wrong. Then it is run

    full disk           in a file system with a random number of free bytes, up to what the command needs
    no inode            in a file system with room for a few more files
    largest file        with a random limit to the size of a file, as `ulimit -f` sets it
    open files          with a random limit to the number of open files, as `ulimit -n` sets it
    read-only           in a file system that is mounted read-only
    no permission       as a user who may not write to the folder

and then, in processes of their own, with a home folder and a folder for temporary files that cannot be used, in a
folder that was deleted, with closed streams, in the C locale, in a terminal of 40 columns, with strange file names,
and twice at the same time with one output. A command must end with status 0, or with two lines and another status
than 0; what has the output's name must be whole, nothing unfinished may be left, and the same command must succeed
once nothing is wrong. Full disks and other users need root; without it these rows are missing and are named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import kills  # noqa: E402

NOBODY = 65534
SECONDS = 300  # after which a command hangs
GOOD = ("done", "refused")
PAGE = 4096
Setup = Callable[[], None]


@dataclass(frozen=True)
class Command:
    """A command that writes one output.

    Attributes
    ----------
    name : str
        Of the row in the table.
    arguments : list of str
        Arguments.
    output : str
        Path of its output, in the folder with the inputs.
    whole : callable
        Raises if the output is not whole.
    """

    name: str
    arguments: list[str]
    output: str
    whole: Callable[[Path], object]


def commands() -> list[Command]:
    """Return the commands: those of `tools/kills.py`, and the other ones that write."""
    known = [Command(case.name, case.new, case.output, case.identity) for case in kills.cases()]
    tuned = "tune source other -p a2sf --grid alpha=0.1,0.5 --budget 20% -o tuned.toml"
    more = [
        ("export", "export first -o table", "reports/table", _whole_table),
        ("export csv", "export first --format csv -o table", "reports/table", _whole_table),
        ("tune", tuned, "tuned.toml", _whole_tuning),
        ("import", "import maps.npz -o imported", "traces/imported", kills.identity_of_trace),
        ("score", "score first -o scored", "reports/scored", kills.decisions_of_replay),
        ("diff --update", "diff baseline.json second --update", "baseline.json", _whole_baseline),
        ("report data", "report first --data-only -o data", "reports/data.json", _whole_json),
    ]
    return known + [Command(name, arguments.split(), output, whole) for name, arguments, output, whole in more]


def _whole_table(path: Path) -> None:
    import pandas as pd
    import pyarrow.parquet as pq

    about = json.loads((path / "export.json").read_text())
    for name, table in about["tables"].items():
        file = path / f"{name}.{about['format']}"
        rows = len(pd.read_csv(file)) if file.suffix == ".csv" else pq.read_metadata(file).num_rows
        assert rows == table["rows"], f"{file.name} has {rows} rows instead of {table['rows']}"


def _whole_tuning(path: Path) -> None:
    from kvscope.policies.spec import parse_policy

    parse_policy(f"a2sf:@{path}")


def _whole_baseline(path: Path) -> None:
    from kvscope.results.baseline import load_summary

    load_summary(path)


def _whole_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def prepare() -> None:
    """Make the inputs of all commands in the current folder."""
    import numpy as np

    from kvscope.cli.app import run
    from kvscope.trace.reader import open_trace

    kills.prepare()
    Path("short.txt").write_text("The keeper lit the lamp every night. " * 3, encoding="utf-8")
    shutil.copy("reports/first/summary.json", "baseline.json")
    maps = np.stack([open_trace(Path("traces/source")).attention(0, layer) for layer in range(2)])
    np.savez("maps.npz", attention=maps[:, None])
    if run(["trace", "--model", "demo", "short.txt", "--max-new-tokens", "4", "-o", "other", "-q"]):
        raise SystemExit("the second trace cannot be made")


def child(arguments: list[str], log: Path, before: Setup, folder: Path) -> int:
    """Return the status of a command in a child of this process, in which `before` is called first; -9 if it hangs."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        kills.run_child(arguments, log, before)
    with _alarm(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def _alarm(pid: int) -> Iterator[None]:
    """End a process after `SECONDS`."""
    old = signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def verdict(status: int, said: str) -> str:
    """Return ``done``, ``refused``, or what is wrong with the end of a command."""
    if "Traceback" in said:
        return f"traceback: {said[said.index('Traceback') :]}"
    if status < 0:
        return f"ended by signal {-status}: {said}"
    errors = [number for number, line in enumerate(said.splitlines(), 1) if line.startswith("error: ")]
    if status == 0:
        return f"done, and said: {said}" if errors else "done"
    lines = said.splitlines()  # notes may stand before the error
    return "refused" if errors == [len(lines) - 1] and lines[-1].strip() else f"not two lines: {said!r}"


def left_behind(command: Command, folder: Path) -> str:
    """Return what is wrong with the output of a command that failed or succeeded, or an empty text."""
    output = folder / command.output
    left = [item.name for item in output.parent.glob(output.name + ".*") if not item.name.endswith(".checkpoint")]
    if left:
        return f"left behind: {', '.join(left)}"
    if not output.exists():
        return ""
    try:
        command.whole(output)
    except Exception as error:  # a broken output is a finding, whatever broke
        return f"WRONG: what is not whole has the name: {error}"
    return ""


def attempt(command: Command, folder: Path, log: Path, before: Setup, freed: Setup) -> str:
    """Run a command where something is wrong, then, after `freed`, once more, and return what was found."""
    kept = (folder / command.output).exists()  # as of an older baseline, which must stay
    status = child(command.arguments, log, before, folder)
    said = log.read_text(errors="replace")
    found = verdict(status, said)
    freed()
    wrong = left_behind(command, folder)
    there = (folder / command.output).exists()
    if found not in GOOD:
        return found
    if wrong:
        return wrong
    if status == 0 and not there:
        return "WRONG: the command succeeded without its output"
    if kept and not there:
        return "LOST: the older output is gone"
    if status and there and not kept:
        return f"refused, and its output is there: {said}"
    if status and (again := child(command.arguments, log, lambda: None, folder)):
        return f"the next run failed with {again}: {log.read_text(errors='replace')}"
    return found


def no_setup() -> None:
    """Change nothing."""


def limit(kind: int, value: int) -> Setup:
    """Return a function that sets a limit of this process."""
    return lambda: resource.setrlimit(kind, (value, value))


def as_nobody() -> None:
    """Go on as a user who owns nothing."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def fresh(inputs: Path, folder: Path) -> None:
    """Make a folder with the inputs and nothing else."""
    for item in folder.iterdir():
        shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    shutil.copytree(inputs, folder, dirs_exist_ok=True)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory at a new folder; raises CalledProcessError where that is not allowed."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def used(folder: Path) -> int:
    """Return the bytes in use in the file system of a folder."""
    of = os.statvfs(folder)
    return (of.f_blocks - of.f_bfree) * of.f_frsize


def full_disk(command: Command, inputs: Path, work: Path, log: Path, draw: random.Random, times: int) -> Iterator[str]:
    """Yield what was found with a random number of free bytes, up to what the command needs."""
    with mounted(work / "disk", "size=256m") as disk:
        fresh(inputs, disk)
        before = used(disk)
        if child(command.arguments, log, no_setup, disk):
            yield f"fails where nothing is wrong: {log.read_text()}"
            return
        need = used(disk) - before
        for _ in range(times):
            fresh(inputs, disk)
            filler = disk / "filler"
            free = draw.randrange(0, need + PAGE, PAGE)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 256 * 2**20 - used(disk) - free)
            found = attempt(command, disk, log, no_setup, filler.unlink)
            yield found if found in GOOD else f"{free} bytes free: {found}"


def no_inode(command: Command, inputs: Path, work: Path, log: Path, draw: random.Random, times: int) -> Iterator[str]:
    """Yield what was found in a file system with room for up to twelve more files."""
    with mounted(work / "disk", "size=256m,nr_inodes=1000") as disk:
        for _ in range(times):
            fresh(inputs, disk)
            (disk / "many").mkdir()
            more = draw.randrange(12)
            for number in range(os.statvfs(disk).f_ffree - more):
                (disk / "many" / str(number)).touch()
            found = attempt(command, disk, log, no_setup, lambda: shutil.rmtree(disk / "many"))
            yield found if found in GOOD else f"room for {more} files: {found}"


def limited(
    kind: int,
    low: int,
    high: int,
    command: Command,
    inputs: Path,
    work: Path,
    log: Path,
    draw: random.Random,
    times: int,
) -> Iterator[str]:
    """Yield what was found under a random limit of a process."""
    folder = work / "limited"
    folder.mkdir(exist_ok=True)
    for _ in range(times):
        fresh(inputs, folder)
        value = draw.randrange(low, high)
        found = attempt(command, folder, log, limit(kind, value), no_setup)
        yield found if found in GOOD else f"a limit of {value}: {found}"


def read_only(command: Command, inputs: Path, work: Path, log: Path, draw: random.Random, times: int) -> Iterator[str]:
    """Yield what was found in a file system that is mounted read-only."""
    with mounted(work / "disk", "size=256m") as disk:
        fresh(inputs, disk)

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)

        remount("ro")
        yield attempt(command, disk, log, no_setup, lambda: remount("rw"))


def no_permission(
    command: Command, inputs: Path, work: Path, log: Path, draw: random.Random, times: int
) -> Iterator[str]:
    """Yield what was found as a user who may not write to the folder, or not even read it."""
    folder = work / "others"
    folder.mkdir(exist_ok=True)
    for mode in (0o755, 0o700):
        fresh(inputs, folder)
        places = [folder, folder / "traces", folder / "reports"]
        for place in places:
            place.chmod(mode)
        # The child enters the folder before it becomes another user.
        yield attempt(command, folder, log, as_nobody, no_setup)
        for place in places:
            place.chmod(0o755)


Condition = Callable[[Command, Path, Path, Path, random.Random, int], Iterator[str]]
CONDITIONS: dict[str, tuple[Condition, int]] = {  # and how often each command runs in it at scale 1
    "full disk": (full_disk, 40),
    "no inode": (no_inode, 10),
    "largest file": (partial(limited, resource.RLIMIT_FSIZE, 0, 60_000), 20),
    "open files": (partial(limited, resource.RLIMIT_NOFILE, 12, 60), 10),
    "read-only": (read_only, 1),
    "no permission": (no_permission, 1),
}
ROOT_ONLY = ("full disk", "no inode", "read-only", "no permission")
NAMES = ("a b", "quo\"te's", "🦊 界", "x" * 240, "x" * 255, "-dash", "$(touch ran)", "per%cent", "new\nline")
WRAPPED = {  # shell commands around one that is run as a process of its own
    "no home": "HOME=/nowhere/home NUMBA_CACHE_DIR=/nowhere/cache XDG_CACHE_HOME=/nowhere/cache {}",
    "no folder for temporary files": "TMPDIR=/nowhere/temporary {}",
    "closed stdout": "{} >&-",
    "closed streams": "{} <&- >&- 2>&-",
    "first line": "set -o pipefail; {} | head -n 1 > /dev/null",
    "full stdout": "{} > /dev/full",
    "C locale": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}",
    "40 columns": "COLUMNS=40 {}",
    "deleted folder": "mkdir gone && cd gone && rmdir ../gone && {}",
}
READING = ("info first", "diff first second", "policies", "regret first")
WRITING = ("trace", "replay", "report")


def wrapped(shell: str, arguments: list[str], folder: Path) -> str:
    """Return what was found when a command ran in a shell of its own."""
    line = shell.format(shlex.join([sys.executable, "-m", "kvscope", *arguments]))
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, timeout=SECONDS)
    said = done.stderr.decode(errors="replace")
    silent = not any(text.startswith(("error: ", "Traceback")) for text in said.splitlines())
    if done.returncode == 1 and silent and (">&-" in shell or "head" in shell):
        return "refused"  # there was no stream to say it on, or nobody reads any more
    if "COLUMNS=40" in shell and any(len(text) > 40 for text in done.stdout.decode().splitlines()):
        return "wider than the terminal"
    return verdict(0 if done.returncode == 3 else done.returncode, said)


def in_shells(inputs: Path, work: Path) -> dict[str, Counter[str]]:
    """Return for each condition what was found when commands that read and that write ran in it."""
    found: dict[str, Counter[str]] = {}
    folder = work / "shells"
    folder.mkdir()
    known = {command.name: command for command in commands()}
    for name, shell in WRAPPED.items():
        fresh(inputs, folder)
        outcomes = [wrapped(shell, arguments.split(), folder) for arguments in READING]
        for command in (known[each] for each in WRITING):
            outcome = wrapped(shell, command.arguments, folder)
            outcomes.append(left_behind(command, folder) or outcome)
        found[name] = Counter(outcomes)
        print(f"{name:13} {dict(found[name])}", flush=True)
    fresh(inputs, folder)
    found["names"] = Counter(_named(name, folder) for name in NAMES)
    found["twice at once"] = Counter(_twice(command, inputs, folder) for command in commands())
    for name in ("names", "twice at once"):
        print(f"{name:13} {dict(found[name])}", flush=True)
    return found


def _named(name: str, folder: Path) -> str:
    """Return what was found when a replay and what is made of it had a strange name."""
    for arguments in (
        ["replay", "source", "-p", "h2o", "--budget", "20%", "-o", name, "-q"],
        ["report", name, "-o", name, "-q"],
        ["export", name, "-o", f"{name[:200]}e", "-q"],
    ):
        found = wrapped("{}", arguments, folder)
        if found != "done":
            return found if len(os.fsencode(name)) >= 240 or name.startswith("-") else f"{name!r}: {found}"
    return "WRONG: a name was run" if (folder / "ran").exists() else "done"


def _twice(command: Command, inputs: Path, folder: Path) -> str:
    """Return what was found when a command ran twice at the same time."""
    fresh(inputs, folder)
    line = [sys.executable, "-m", "kvscope", *command.arguments]
    running = [subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=SECONDS)[1].decode() for process in running]
    found = [verdict(process.returncode, text) for process, text in zip(running, said, strict=True)]
    wrong = [each for each in found if each not in GOOD]
    if wrong:
        return wrong[0]
    if "done" not in found or not (folder / command.output).exists():
        return f"neither is there: {said}"
    return left_behind(command, folder) or "done"


def campaign(seed: int, scale: float, only: list[str], inputs: Path, work: Path) -> dict[str, Counter[str]]:
    """Return for each condition how often each outcome was found."""
    found: dict[str, Counter[str]] = {}
    for name, (condition, count) in CONDITIONS.items():
        if (only and name not in only) or (name in ROOT_ONLY and os.geteuid() != 0):
            continue
        times = max(1, round(count * scale))
        outcomes: Counter[str] = Counter()
        for command in commands():
            draw = random.Random(f"{seed} {name} {command.name}")
            try:
                made = list(condition(command, inputs, work, work / "stderr.txt", draw, times))
            except subprocess.CalledProcessError:  # a container may forbid mounts to root too
                print(f"{name}: a file system cannot be mounted here", flush=True)
                break
            outcomes.update(each if each in GOOD else f"{command.name}: {each}" for each in made)
        if outcomes:
            found[name] = outcomes
            print(f"{name:13} {dict(outcomes)}", flush=True)
    if not only or "shells" in only:
        found |= in_shells(inputs, work)
    return found


def main() -> int:
    """Run the campaign, and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the runs")
    parser.add_argument("--only", action="append", help="name of a condition, or shells; repeatable")
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # a child of a process with threads would wait for them
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    out = given.out.resolve() if given.out else None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o755)  # another user is to reach what is in it
        inputs = work / "inputs"
        inputs.mkdir()
        os.chdir(inputs)
        with contextlib.redirect_stdout(io.StringIO()):
            prepare()
        os.chdir(work)
        found = campaign(given.seed, given.scale, given.only or [], inputs, work)
        os.chdir(ROOT)
    bad = Counter({f"{name}: {outcome}": count for name, of in found.items() for outcome, count in of.items()})
    bad = Counter(
        {text: count for text, count in bad.items() if not text.endswith(tuple(f": {each}" for each in GOOD))}
    )
    for text, count in bad.items():
        print(f"{count} x {text}")
    if out is not None:
        table = {name: dict(counts) for name, counts in found.items()}
        about = {"seed": given.seed, "conditions": table, "bad": bad.total()}
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(counts.total() for counts in found.values())} runs, {bad.total()} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
