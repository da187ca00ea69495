"""The advice of a refusal works when it is followed: each command is refused, then run again as the refusal says."""

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.models.build import saved

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(14))
# Type of the model, options that are refused, what the advice says, and the options that follow it ({} is its value).
ADVICE = [
    ("lfm2", "--layers 0,1", r"--layers ([\d,]+)", "--layers {}"),
    ("llama", "--heads 1", r"--heads ([\d,]+)", "--heads {}"),
    ("llama4_text", "--store qkv", r"--store (maps)", "--store {}"),
    ("bloom", "--store qkv", r"--store (maps), without --hidden", "--store {}"),
    ("bloom", "--hidden", r"--store (maps), without --hidden", "--store {}"),
    ("llama", "--chat", r"Omit --chat", ""),
    ("llama", "--system x", r"Add (--chat)", "{} --system x"),  # refused again, for another reason: it has no template
    ("llama", "--store qkv --query-stride 2", r"--query-stride with --store (maps)", "--store {} --query-stride 2"),
]


@pytest.mark.parametrize(("name", "refused", "advice", "followed"), ADVICE)
def test_advice_about_a_recording(
    name: str, refused: str, advice: str, followed: str, run: Run, tmp_path: Path
) -> None:
    saved(tmp_path / "model", name)
    Path("prompt.txt").write_text(PROMPT)
    trace = ("trace", "--model", str(tmp_path / "model"), "prompt.txt", "--max-new-tokens", "3", "--output", "t")
    first = run(*trace, *refused.split())
    what, todo = first.two_lines()
    found = re.search(advice, todo)
    assert first.status and found, (what, todo)
    value = found.groups()[0] if found.groups() else ""
    second = run(*trace, *followed.format(value).split())
    assert second.status == 0 or second.two_lines()[0] != what, second.err


@pytest.mark.parametrize("name", ["bloom", "deepseek_v32"])
@pytest.mark.parametrize("command", ["replay", "verify"])
def test_advice_to_stay_in_the_open_loop(name: str, command: str, run: Run, tmp_path: Path) -> None:
    saved(tmp_path / "model", name)
    Path("prompt.txt").write_text(PROMPT)
    made = run("trace", "--model", str(tmp_path / "model"), "prompt.txt", "--max-new-tokens", "3", "--output", "t")
    assert made.status == 0, made.err
    options = ("--policy", "h2o", "--budget", "6")
    first = run(command, "t", *options, *(["--perplexity"] if command == "replay" else []))
    assert first.status and first.two_lines()[1].endswith("kvscope replay without --perplexity."), first.err
    second = run("replay", "t", *options)
    assert second.status == 0, second.err
