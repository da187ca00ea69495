"""Damage gates, checkpoints, tuned parameters and baselines, and look whether anything damaged is accepted.

python tools/damaged_files.py [--cases N] [--seed S] [--output FILE]

Every case changes one file: bits, bytes, its end, one value of its JSON or TOML, or a number of its tensors, and reads
it. Outcomes are those of tools/campaign.py; a wrong one makes the exit status 1.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from kvscope.core.errors import KvscopeError  # noqa: E402
from kvscope.core.json_records import plain  # noqa: E402
from kvscope.core.summary_records import SUMMARY  # noqa: E402
from kvscope.gates.module import LearnedGate, load_gate  # noqa: E402
from kvscope.policies.spec import parse_policy  # noqa: E402
from kvscope.results.baseline import load_summary  # noqa: E402
from kvscope.training import fit  # noqa: E402
from kvscope.training.fit import TrainingSettings  # noqa: E402
from tools.campaign import BAD, OUTCOMES  # noqa: E402
from tools.mutations import VALUES, paths  # noqa: E402

Damage = Callable[[random.Random, bytes], bytes]
SETTINGS = TrainingSettings(steps=4)


@dataclass(frozen=True)
class File:
    """A file that is damaged: its whole content, how it is read, and the damage that its form allows."""

    content: bytes
    read: Callable[[Path], str]
    forms: tuple[Damage, ...]


def flip_bit(draw: random.Random, content: bytes) -> bytes:
    """Return content with one bit flipped."""
    made = bytearray(content)
    bit = draw.randrange(8 * len(made))
    made[bit // 8] ^= 1 << bit % 8
    return bytes(made)


def zero_bytes(draw: random.Random, content: bytes) -> bytes:
    """Return content with up to 64 bytes that are zero."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.randint(1, 64))
    return content[:start] + bytes(stop - start) + content[stop:]


def cut(draw: random.Random, content: bytes) -> bytes:
    """Return content without its end, or with something after it."""
    return content[: draw.randrange(len(content))] if draw.random() < 0.8 else content + b"\0" * draw.randint(1, 9)


def swap_parts(draw: random.Random, content: bytes) -> bytes:
    """Return content with two parts of 16 bytes exchanged."""
    one, two = sorted(draw.sample(range(0, len(content) - 32, 16), 2))
    first, second = content[one : one + 16], content[two : two + 16]
    return content[:one] + second + content[one + 16 : two] + first + content[two + 16 :]


def json_value(draw: random.Random, content: bytes) -> bytes:
    """Return JSON with one value changed, removed or renamed."""
    data = json.loads(content)
    _change(draw, data)
    return json.dumps(data).encode()


def _change(draw: random.Random, data: Any) -> None:
    *parents, last = draw.choice(paths(data))
    place = data
    for part in parents:
        place = place[part]
    what = draw.choice(["value", "value", "number", "remove", "rename"])
    if what == "remove" or (what == "rename" and isinstance(place, list)):
        del place[last]
    elif what == "rename":
        place[f"{last}x"] = place.pop(last)
    elif what == "number" and type(place[last]) in (int, float):
        place[last] += draw.choice([-1, 1, 2**40, -20])
    else:
        place[last] = copy.deepcopy(draw.choice(VALUES))


def tensors_header(draw: random.Random, content: bytes) -> bytes:
    """Return safetensors with one value of its header changed: shapes, offsets, types, names, metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    _change(draw, header)
    made = json.dumps(header).encode()
    stated = len(made) if draw.random() < 0.9 else draw.choice([0, 1, 2**40, 2**63, len(made) - 1])
    return stated.to_bytes(8, "little") + made + content[8 + size :]


def tensors_about(draw: random.Random, content: bytes) -> bytes:
    """Return safetensors with one value changed in the JSON texts of its metadata."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    about = header["__metadata__"]
    name = draw.choice([key for key, text in about.items() if text.startswith("{")])
    data = json.loads(about[name])
    _change(draw, data)
    about[name] = json.dumps(data)
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + content[8 + size :]


def toml_value(draw: random.Random, content: bytes) -> bytes:
    """Return TOML with one number or text changed, a line removed, repeated, or exchanged with another."""
    lines = content.decode().splitlines()
    number = draw.randrange(len(lines))
    what = draw.choice(["number", "number", "text", "remove", "repeat", "exchange"])
    if what == "remove":
        del lines[number]
    elif what == "repeat":
        lines.insert(draw.randrange(len(lines)), lines[number])
    elif what == "exchange":
        other = draw.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    else:
        pattern = r"\d+(\.\d+)?" if what == "number" else r'"[^"]*"'
        new = draw.choice(["-1", "0", "1", "3", "nan", "inf", "1e300", "9" * 30, '"x"', "[]", "{}", "true", ""])
        places = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        number = draw.choice(places)
        lines[number] = re.sub(pattern, lambda _: new, lines[number], count=1)
    return ("\n".join(lines) + "\n").encode()


def _digest(*parts: object) -> str:
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            whole.update(part.detach().contiguous().numpy().tobytes())
        else:
            whole.update(repr(part).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def read_gate(path: Path) -> str:
    """Return a digest of a gate."""
    gate = load_gate(str(path))
    return _digest(gate.facts, *(part for item in sorted(gate.state_dict().items()) for part in item))


def read_tuned(path: Path) -> str:
    """Return a digest of tuned parameters."""
    policy = parse_policy(f"a2sf:@{path}")
    return _digest([setting.parameters() for setting in policy.settings], policy.layers, policy.choice)


def read_baseline(path: Path) -> str:
    """Return a digest of a baseline."""
    return _digest(json.dumps(plain(load_summary(path)), sort_keys=True))


def _untrained() -> tuple[LearnedGate, torch.optim.Optimizer]:
    known = load_gate("demo")
    torch.manual_seed(0)
    gate = LearnedGate(known.facts, known.get_buffer("weights").clone())
    return gate, torch.optim.Adam(gate.parameters(), lr=0.01)


def read_checkpoint(path: Path) -> str:
    """Return a digest of the state that a training is continued from."""
    gate, optimizer = _untrained()
    state = fit._read(path, gate, optimizer, SETTINGS, {"seed": 0})
    of_adam = [value for parameter in gate.parameters() for value in optimizer.state[parameter].values()]
    tensors = [*gate.state_dict().values(), *state.parameters.values(), *of_adam]
    return _digest(state.step, state.best, state.since, state.log, *tensors)


def make_checkpoint(path: Path) -> None:
    """Write the checkpoint of a training after one step."""
    gate, optimizer = _untrained()
    torch.stack([parameter.square().sum() for parameter in gate.parameters()]).sum().backward()
    optimizer.step()
    parameters = {name: value.clone() for name, value in gate.state_dict().items()}
    log = [fit.Evaluation(step, 2.5 - step, 0.5, [0.5, 0.25], 3.0 - step) for step in (0, 1)]
    state = fit._State(step=1, best=2.0, since=0, log=log, parameters=parameters)
    fit._write(path, gate, optimizer, SETTINGS, {"seed": 0}, state)


TUNED = {"a2sf": (0.1, 0.5)}
BYTES: tuple[Damage, ...] = (flip_bit, zero_bytes, cut, swap_parts)


def make_tuned() -> str:
    """Return the text of tuned parameters."""
    from kvscope.policies.a2sf import A2SF
    from kvscope.policies.tuned import Tuned
    from kvscope.results.statistics import paired
    from kvscope.tune.result import Tuning, to_toml

    settings = tuple(A2SF(alpha=value) for value in TUNED["a2sf"])
    tuned = Tuned("tuned.toml", settings, (0, 1, 2), ((0, 1, 1, 0), (1, 1, 0, 0), (0, 0, 0, 1)))
    means = {"tuned": [0.5, 0.6], "best": [0.4, 0.5], "hindsight": [0.5, 0.5]}
    about = {"policy": "a2sf", "parameters": ["alpha"], "per": "head", "budget": "20%", "traces": ["a", "b"]}
    gain = paired(means["tuned"], means["best"])
    return to_toml(Tuning(tuned, settings[0], settings[1], means, means, gain, about))


def make_files(folder: Path) -> dict[str, File]:
    """Return the files to damage."""
    make_checkpoint(folder / "checkpoint")
    demo = ROOT / "kvscope" / "model" / "demo" / "gate.safetensors"
    in_tensors = (*BYTES, tensors_header, tensors_about)
    summary = SUMMARY.text(load_summary(ROOT / "reports" / "example"), ordered=True)  # with a checksum
    return {
        "gate": File(demo.read_bytes(), read_gate, in_tensors),
        "checkpoint": File((folder / "checkpoint").read_bytes(), read_checkpoint, in_tensors),
        "tuned": File(make_tuned().encode(), read_tuned, (*BYTES, toml_value, toml_value)),
        "baseline": File(summary.encode(), read_baseline, (*BYTES, json_value, json_value)),
    }


def run_case(number: int, seed: int, files: dict[str, File], expected: dict[str, str], folder: Path) -> tuple[str, ...]:
    """Return the name of the file, the damage, the outcome and what was said in one case."""
    draw = random.Random(f"{seed} {number}")
    name = draw.choice(sorted(files))
    damage = draw.choice(files[name].forms)
    path = folder / f"{number}{'.json' if name == 'baseline' else ''}"
    path.write_bytes(damage(draw, files[name].content))
    try:
        outcome = "same result" if files[name].read(path) == expected[name] else BAD[0]
        said = ""
    except KvscopeError as error:
        lines, said = str(error).splitlines(), str(error)
        outcome = "refused" if len(lines) == 2 and all(lines) else "traceback"
    except BaseException:
        outcome, said = "traceback", traceback.format_exc(limit=-4)
    path.unlink()
    return name, damage.__name__, outcome, said


def campaign(cases: int, seed: int) -> tuple[dict[str, Counter[str]], list[str]]:
    """Return for each file and damage how often each outcome was found, and a line about each wrong one."""
    found: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    folder = Path(tempfile.mkdtemp())
    try:
        files = make_files(folder)
        expected = {}
        for name, file in files.items():
            whole = folder / f"whole-{name}.json"
            whole.write_bytes(file.content)
            expected[name] = file.read(whole)
        for number in range(cases):
            name, damage, outcome, said = run_case(number, seed, files, expected, folder)
            found.setdefault(f"{name}: {damage}", Counter())[outcome] += 1
            if outcome in BAD:
                wrong.append(f"case {number}: {name}: {damage}: {outcome}: {said}")
    finally:
        shutil.rmtree(folder)
    return found, wrong


def main() -> int:
    """Run a campaign; returns 1 if a damaged file was accepted, or ended in anything but two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    started = time.monotonic()
    found, wrong = campaign(given.cases, given.seed)
    print(*wrong, sep="\n")
    for name, counts in sorted(found.items()):
        print(f"{name:28} " + ", ".join(f"{outcome} {count}" for outcome, count in counts.items()))
    total = sum(found.values(), Counter())
    print(f"{total.total()} cases in {time.monotonic() - started:.0f} s: {dict(total)}")
    if given.output:
        figures = {
            "seed": given.seed,
            "cases": given.cases,
            "outcomes": {name: total[name] for name in OUTCOMES},
            "files": {name: dict(counts) for name, counts in sorted(found.items())},
        }
        given.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
