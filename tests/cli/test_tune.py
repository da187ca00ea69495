"""``kvscope tune``: a file that a replay takes, and mistakes that cost nothing."""

import json
import tomllib
from pathlib import Path

import pytest

from kvscope.results.store import open_replay
from tests.cli.conftest import Run
from tests.models.build import saved
from tests.trace import make

SEQUENCES = [(7, 1), (11, 5), (13, 2), (17, 9)]  # step and start of each text
ALPHA = ("--grid", "alpha=0,0.4,1")


@pytest.fixture
def many(run: Run) -> Path:
    """A trace of eight short sequences, ``traces/many``."""
    path = Path("traces/many")
    path.parent.mkdir()
    unlike = [list(range(100 * sequence, 100 * sequence + 24)) for sequence in range(8)]
    make.record(path, lengths=[24] * 8, prompt=14, heads=4, kv_heads=2, ids=unlike)
    return path


def test_from_a_trace_to_a_replay(run: Run, many: Path) -> None:
    done = run("tune", *ALPHA, "--budget", "40%")
    assert done.status == 0, done.err
    assert "traces/many" in done.err, "what was taken is said"
    assert "next: kvscope replay --policy a2sf:@tuned.toml" in done.err
    for said in ("a2sf(@tuned.toml)", "best single", "in hindsight", "searched (6)", "held out (2)"):
        assert said in done.out, said
    assert "retained_mass at 40%, full prefill, open loop; a setting per head." in " ".join(done.out.split())
    assert "2 sequences: p cannot go below" in " ".join(done.out.split())
    choice = tomllib.loads(Path("tuned.toml").read_text())
    assert choice["policy"] == "a2sf" and [len(row) for row in choice["choice"]] == [2, 2]

    specs = ["a2sf:@tuned.toml", *(f"a2sf:alpha={alpha}" for alpha in (0, 0.4, 1))]
    policies = [word for spec in specs for word in ("--policy", spec)]
    done = run("replay", *policies, "--budget", "40%", "-o", "mine", "-q")
    assert done.status == 0, done.err
    assert "a2sf(@tuned.toml)" in done.out

    replay = open_replay(Path("reports/mine"))
    frames = [replay.fidelity(run=number) for number in range(4)]
    assert replay.info.runs[0].params["choice"] == choice["choice"]
    used = [own["alpha"] for own in choice["settings"]]
    for place, layer in enumerate(choice["layers"]):
        for head in range(4):
            own = frames[1 + [0, 0.4, 1].index(used[choice["choice"][place][head // 2]])]
            here = [frame[(frame["layer"] == layer) & (frame["head"] == head)] for frame in (frames[0], own)]
            assert here[0]["retained_mass"].tolist() == here[1]["retained_mass"].tolist()


def test_json_and_quiet(run: Run, many: Path) -> None:
    done = run("tune", "many", *ALPHA, "--per", "layer", "--held-out", "5", "-o", "layers.toml", "--json", "-q")
    assert done.status == 0, done.err
    assert done.err == ""
    data = json.loads(done.out)
    assert data["file"] == "layers.toml" and data["held_out_sequences"] == 5 and data["parameters"] == ["alpha"]
    assert set(data["held_out"]) == {"tuned", "best", "hindsight"} and set(data["searched"]) == {"tuned", "best"}
    assert data["gain"]["low"] <= data["gain"]["mean"] <= data["gain"]["high"] and 0 < data["gain"]["p"] <= 1
    assert data["gain"]["mean"] == pytest.approx(data["held_out"]["tuned"] - data["held_out"]["best"])
    assert all(data["settings"][row[0]]["alpha"] in (0, 0.4, 1) for row in data["choice"])


def test_the_usual_values_and_several_traces(run: Run, many: Path) -> None:
    make.record(Path("traces/more"), lengths=[20, 26], prompt=14, heads=4, kv_heads=2)
    done = run("tune", "many", "more", "--budget", "30%", "--prefill", "stream", "--json", "-q")
    assert done.status == 0, done.err
    data = json.loads(done.out)
    assert data["traces"] == ["many", "more"]
    assert (data["searched_sequences"], data["held_out_sequences"]) == (8, 2)
    assert data["prefill"] == "stream"


def test_an_existing_file_is_left_alone(run: Run, many: Path) -> None:
    Path("tuned.toml").write_text("mine")
    done = run("tune", *ALPHA)
    assert done.status == 1
    assert "tuned.toml exists" in done.two_lines()[0] and "--force" in done.two_lines()[1]
    assert Path("tuned.toml").read_text() == "mine"
    done = run("tune", *ALPHA, "--force", "-q")
    assert done.status == 0, done.err
    assert run("replay", "-p", "a2sf:@tuned.toml", "-q").status == 0


def test_heads_of_a_latent_cache(run: Run) -> None:
    """Where the layer decides by default, heads are tuned one by one only if they are to decide; so says the advice."""
    saved(Path("model"), "deepseek_v3")
    texts = [" ".join(f"w{(step * number + start) % 90 + 3}" for number in range(16)) for step, start in SEQUENCES]
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    done = run("trace", "--model", "model", "prompts.jsonl", "--max-new-tokens", "8", "-o", "traces/latent", "-q")
    assert done.status == 0, done.err
    tune = ("tune", *ALPHA, "--budget", "6", "--force")
    what, todo = run(*tune).two_lines()
    assert what == "a2sf(alpha=0.0) decides per layer" and todo.endswith("or --scope kv_head.")
    done = run(*tune, "--scope", "kv_head")
    assert done.status == 0, done.err
    assert "a setting per head of a2sf, which decides per kv_head" in " ".join(done.out.split())
    assert [len(row) for row in tomllib.loads(Path("tuned.toml").read_text())["choice"]] == [4, 4, 4]
    following = done.err.partition("next: ")[2].split("\n")[0]
    assert following.endswith("--scope kv_head")
    assert run(*following.split()[1:], "--budget", "6", "-o", "heads", "-q").status == 0
    assert open_replay(Path("reports/heads")).info.runs[0].label == "a2sf(@tuned.toml)"
    assert run(*tune, "--per", "layer", "--scope", "layer").status == 0
    assert run("replay", "-p", "a2sf:@tuned.toml", "--scope", "layer", "--budget", "6", "-o", "layers").status == 0


def test_a_policy_of_ones_own(run: Run, many: Path) -> None:
    Path("mine.py").write_text(
        '''
from dataclasses import dataclass
from kvscope import Policy, parameter

@dataclass(frozen=True)
class Mine(Policy):
    """Sums that fade."""

    fade: float = parameter(0.9, "what is left", search=(0.1, 0.9))

    def observe(self, step, score):
        return step.weights() + self.fade * score
'''
    )
    done = run("tune", "-p", "mine.py:Mine", "-o", "own.toml")
    assert done.status == 0, done.err
    assert "next: kvscope replay --policy mine.py:Mine:@own.toml" in done.err
    done = run("replay", "-p", "mine.py:Mine:@own.toml", "-q")
    assert done.status == 0, done.err
    assert json.loads(Path("reports/many-tuned/run.json").read_text())["runs"][0]["label"] == "Mine(@own.toml)"


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["--grid", "alpha"], "--grid 'alpha' is not a list of values", "--grid alpha=0.1,0.5,0.9"),
        (["--grid", "alpha= , "], "is not a list of values", "--grid alpha=0.1,0.5,0.9"),
        (["--grid", "=1,2"], "is not a list of values", "--grid alpha=0.1,0.5,0.9"),
        (["--grid", "alpha=0,1", "--grid", "--alpha=0.5,0.6"], "is not a list of values of one", "--grid"),
        (["--grid", "alhpa=1,2"], "--alhpa", "alpha"),
        (["--grid", "alpha=1"], "the grid has one setting", "two values"),
        (["--grid", "alpha=0,much"], "much", "kvscope policies a2sf"),
        (["-p", "tova"], "does not declare values for a search", "--grid"),
        (["-p", "a2fs"], "a2fs", "a2sf"),
        (["-p", "a2sf:@nowhere.toml"], "cannot read nowhere.toml", "kvscope tune"),
        (["--metric", "held_keys"], "held_keys has no best value", "retained_mass"),
        (["--metric", "retained"], "retained", "retained_mass"),
        (["--per", "token"], "token", "--help"),
        (["--held-out", "8"], "8 of 8 sequences cannot be held out", "several prompts"),
        (["many", "many"], "given twice", "once"),
        (["-o", "no/where.toml"], "no/where.toml", "folder that exists"),
        (["-o", "traces", "--force"], "traces", "-o tuned.toml"),
        (["--scope", "token"], "--scope 'token' is unknown", "kv_head, layer"),
        (
            ["--scope", "layer"],
            "a2sf(alpha=0.0) decides per layer",
            "Use --per layer or --per model, or --scope kv_head.",
        ),
        (["-o", ""], "cannot be written", "-o tuned.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(run: Run, many: Path, arguments: list[str], what: str, todo: str) -> None:
    before = sorted(Path().rglob("*"))
    done = run("tune", *arguments)
    said = done.two_lines()
    assert done.status == 2
    assert what in said[0]
    assert todo in said[1]
    assert done.out == ""
    assert sorted(Path().rglob("*")) == before


def test_one_sequence_is_not_enough(run: Run, small: Path) -> None:
    done = run("tune", *ALPHA)
    assert done.status == 2
    assert "1 of 1 sequences cannot be held out" in done.two_lines()[0]
    assert not Path("tuned.toml").exists()


def test_a_file_for_another_model(run: Run, many: Path, small: Path) -> None:
    """The traces differ in the numbers of their layers."""
    assert run("tune", "many", *ALPHA, "-q").status == 0
    done = run("replay", "small", "-p", "a2sf:@tuned.toml")
    assert done.status == 2
    assert done.two_lines() == ("tuned.toml was tuned not for layer 1", "Tune on a trace of this model.")
    assert not list(Path().glob("reports/*"))
