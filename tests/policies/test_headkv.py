"""HeadKV against its plain-loop reference: SnapKV's choice, within budgets of heads in proportion to their scores."""

import itertools
from pathlib import Path

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import groups, head_sets
from tests.reference.policies import allocations, snapkv

LENGTH, LAYERS = 50, 2
CASES = [(44, 12), (38, 25), (36, 17), (9, 9), (3, 12), (40, LENGTH), (47, 1), (48, 2), (45, 3), (42, 40)]
SCORES = [[0.9, 0.0], [0.1, 0.35]]


def table(folder: Path) -> str:
    file = folder / "heads.tsv"
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in SCORES))
    return str(file)


@pytest.mark.parametrize(("window", "kernel", "beta"), [(32, 7, 1.2), (3, 3, 1.2), (4, 5, 2.0), (2, 1, 1.0)])
@pytest.mark.parametrize("observed", [True, False])
def test_decisions_and_budgets_equal_the_plain_loop(
    observed: bool, window: int, kernel: int, beta: float, tmp_path: Path
) -> None:
    lent = 0
    heads = "observed" if observed else table(tmp_path)
    policy = parse_policy(f"headkv:window={window},kernel={kernel},beta={beta},heads={heads}")
    for seed, (prompt, budget) in enumerate(CASES):
        rows, cut = groups(seed, 4, 2, LAYERS, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
        width = min(window, budget // 2)
        scores = [[allocations.far_weight(own, prompt) for own in layer] for layer in cut] if observed else SCORES
        shares = allocations.heads(scores, budget, width, prompt, beta)
        assert sum(map(sum, shares)) == budget * 4
        assert simulation.state.budget[0].tolist() == shares
        lent += shares != [[budget] * 2] * LAYERS
        for layer, head in itertools.product(range(LAYERS), range(2)):
            at = {"window": window, "kernel": kernel, "pooling": "max", "capacity": shares[layer][head]}
            assert head_sets(simulation, layer, head) == snapkv.snapkv(cut[layer][head], budget, prompt, **at)
    assert lent >= 3


# Allocated by FYYFU/HeadKV @0862a09, `ReasonSnapKVCluster`, to two layers with four heads of the scores below:
# base_capacity less window, beta -> keys of each head beside the window.
OF_HEADS = [0.05, 0.2, 0.0, 0.6, 0.01, 0.4, 0.33, 0.07]
PUBLISHED = {
    (24, 1.2): [9, 23, 4, 62, 5, 43, 36, 11],
    (40, 2.0): [25, 39, 20, 78, 21, 59, 52, 27],
    (30, 1.005): [8, 29, 1, 85, 2, 57, 47, 11],
}


@pytest.mark.parametrize(("base", "beta"), PUBLISHED)
def test_budgets_are_those_of_the_authors_code_up_to_joint_rounding(base: int, beta: float, tmp_path: Path) -> None:
    file = tmp_path / "heads.tsv"
    file.write_text("\n".join("\t".join(map(str, OF_HEADS[start : start + 4])) for start in (0, 4)))
    rows, _ = groups(1, 4, 4, 2, 160)
    policy = parse_policy(f"headkv:window=8,beta={beta},heads={file}")
    made = run(policy, rows, [base + 8], kv_heads=4, prompt=158, prefill="full").state.budget.flatten() - 8
    published = PUBLISHED[base, beta]
    assert published == allocations.published_heads(OF_HEADS, base, beta)
    assert made.sum() == base * 8
    assert (made - torch.tensor(published)).abs().max() <= 1


def test_what_is_refused(tmp_path: Path) -> None:
    for setting in ("beta=0.5", "window=0", "kernel=4"):
        with pytest.raises(UsageError, match=setting.split("=")[0]):
            parse_policy(f"headkv:{setting}")
    with pytest.raises(UsageError, match="2 layers with 2 heads, and the model has 3 with 2"):
        parse_policy(f"headkv:heads={table(tmp_path)}").fit((0,), 2, 3)
