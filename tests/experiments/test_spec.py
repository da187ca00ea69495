"""The file of an experiment: what its keys mean, and every mistake in two lines."""

import re
from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.experiments import describe
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.experiments.spec import policy_specs, read_experiment
from kvscope.policies import POLICIES

LEAST = "model: demo\ntasks: needle\nlengths: 64\npolicies: h2o\n"


def read(folder: Path, text: str, name: str = "mine.yaml") -> Experiment:
    (folder / name).write_text(text, encoding="utf-8")
    return read_experiment(folder / name)


def test_a_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    lists = "models: [demo]\ntasks: [needle]\nlengths: [64]\npolicies: [h2o]\nbudgets: ['20%']\nprefill: [full]\n"
    assert read(tmp_path, LEAST) == read(tmp_path, lists)
    made = read(tmp_path, LEAST)
    assert (made.name, made.models, made.budgets, made.prefill) == (
        "mine",
        (ModelEntry(model="demo"),),
        ("20%",),
        (Prefill.full,),
    )


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    grid = "{a2sf: {alpha: [0.3, 0.7], recent: 4}, vatp: {base: [h2o, 'a2sf(alpha=0.7)']}}"
    made = read(tmp_path, LEAST.replace("h2o", f"[tova, {grid}, {{h2o: {{}}}}]"))
    assert made.policies == (
        "tova",
        "a2sf:alpha=0.3,recent=4",
        "a2sf:alpha=0.7,recent=4",
        "vatp:base=h2o",
        "vatp:base=a2sf(alpha=0.7)",
        "h2o",
    )


def test_toml_says_the_same_as_yaml(tmp_path: Path) -> None:
    toml = 'model = "demo"\ntasks = "needle"\nlengths = 64\n'
    toml += 'policies = ["h2o", {a2sf = {alpha = [0.3]}}]\nbudgets = [8, "20%"]\n'
    yaml = LEAST.replace("policies: h2o", "policies: [h2o, {a2sf: {alpha: [0.3]}}]\nbudgets: [8, 20%]")
    assert read(tmp_path, toml, "mine.toml") == read(tmp_path, yaml)


def test_prompts_of_files_need_no_answers_by_default(tmp_path: Path) -> None:
    assert "generate" in read(tmp_path, LEAST).steps
    prompts = "model: demo\nprompts: a.txt\npolicies: h2o\n"
    assert read(tmp_path, prompts).steps == ("trace", "replay", "closed-loop", "report")
    assert read(tmp_path, prompts + "steps: [generate]").loop_steps == ("replay", "closed-loop", "generate")


def test_all_policies_may_be_skipped_but_not_those_that_are_named() -> None:
    found = dict(policy_specs(["all", "tova"]))
    assert set(found) == set(POLICIES.names())
    assert [name for name, optional in found.items() if not optional] == ["tova"]


@pytest.mark.parametrize(
    ("change", "what", "todo"),
    [
        ("polices: h2o", "unknown key 'polices'", "Did you mean policies"),
        ("model: demo", "given twice", "Correct the file."),
        ("models: {nam: demo}", "both model and models", "models: [a, b]"),
        ("budgets: 0.2", "budget '0.2' could be keys or a share", "percent sign"),
        ("budgets: [no]", "budgets[0]: expected `str`, got `bool`", "docs/experiments.md"),
        ("lengths: [-4]", "given twice", "Correct"),
        ("examples: many", "examples: expected `int`, got `str`", "docs/experiments.md"),
        ("prefill: half", "prefill[0]: invalid enum value 'half'", "docs/experiments.md"),
        ("steps: [trace, think]", "steps[1]: invalid enum value 'think'", "docs/experiments.md"),
        ("seeds: [", "is not YAML", "Correct the file."),
        ("? [a]\n: b", "is not YAML", "Correct the file."),
        ("x: !!python/object/apply:os.system ['echo']", "is not YAML", "Correct the file."),
    ],
)
def test_a_mistake_is_named_with_what_to_do(tmp_path: Path, change: str, what: str, todo: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, LEAST + change)
    assert what in caught.value.what and todo in caught.value.todo, caught.value


@pytest.mark.parametrize(
    ("text", "what", "todo"),
    [
        ("", "has no keys", "model: demo"),
        ("- h2o", "has no keys", "model: demo"),
        ("tasks: needle\nlengths: 9\npolicies: h2o", "names no model", "model: demo"),
        ("model: demo\npolicies: h2o", "neither tasks nor prompts", "tasks: [needle]"),
        ("model: demo\ntasks: needle\npolicies: h2o", "no lengths", "lengths: [512, 1024]"),
        ("model: demo\ntasks: needle\nlengths: 64", "no policy", "policies: [h2o, tova]"),
        (LEAST.replace("needle", "neddle"), "neddle", "needle"),
        (LEAST.replace("h2o", "h20"), "h20", "h2o"),
        (LEAST.replace("h2o", "{a2sf: {alhpa: 1}}"), "no parameter 'alhpa'", "alpha"),
        (LEAST.replace("h2o", "{a2sf: 3}"), "the parameters of a2sf are not a table", "{a2sf: {parameter"),
        (LEAST.replace("h2o", "[h2o, 3]"), "3 is not a policy", "Write h2o"),
        (LEAST.replace("h2o", "[h2o, h2o:recent=none]"), "named twice", "once"),
        (LEAST.replace("demo", "{name: demo}"), "unknown key of a model 'name'", "model"),
    ],
)
def test_what_is_missing_or_wrong_is_named(tmp_path: Path, text: str, what: str, todo: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert what in caught.value.what and todo in caught.value.todo, caught.value


def test_aliases_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [h2o]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(UsageError, match="unknown key"):
        read(tmp_path, "\n".join(rows))
    with pytest.raises(UsageError, match="is not a policy"):
        read(tmp_path, LEAST.replace("policies: h2o", "policies: &a [*a]"))


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert block.removeprefix("# experiment.yaml\n") == describe.EXAMPLE and len(block.splitlines()) <= 10
    made = read(tmp_path, block)
    assert (len(made.tasks), len(made.lengths), len(made.budgets)) == (3, 2, 3) and len(made.policies) >= 5
