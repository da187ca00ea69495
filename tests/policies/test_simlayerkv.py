"""SimLayerKV against its plain-loop reference, and against what kvpress decides."""

import pytest

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import head_sets, simulations
from tests.policies.test_authors_decisions import attention_of_waves
from tests.reference.policies.simlayerkv import lazy, simlayerkv

CASES = [(1, 5), (4, 9), (9, 9), (17, 6), (25, 1), (12, 2), (20, 26)]  # the budgets are ignored


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.6, 0.7, 1.0])
@pytest.mark.parametrize(("last", "sinks", "recent"), [(1, 4, 8), (4, 1, 5), (32, 0, 6), (3, 2, 1)])
def test_decisions_equal_the_plain_loop(last: int, sinks: int, recent: int, threshold: float) -> None:
    spec = f"simlayerkv:rows={last},sinks={sinks},recent={recent},threshold={threshold}"
    settings = {"last": last, "sinks": sinks, "recent": recent, "threshold": threshold}
    for rows, visible, held, prompt, _ in simulations(spec, "full", CASES):
        assert (visible, held) == simlayerkv(rows, prompt, **settings)


def test_layers_decide_apart() -> None:
    rows = attention(4, 2, 4, 30)
    rows[1] *= 0.2
    rows[1, ..., 0] += 0.8
    simulation = run(
        parse_policy("simlayerkv:recent=6,sinks=2,threshold=0.7"), rows, [10], kv_heads=2, prompt=24, prefill="full"
    )
    settings = {"last": 32, "sinks": 2, "recent": 6, "threshold": 0.7}
    assert [lazy(layer.numpy(), 24, **settings) for layer in rows] == [False, True]
    assert [len(head_sets(simulation, layer, 0)[1][-1]) for layer in range(2)] == [30, 2 + 6 + 6]
    assert head_sets(simulation, 1, 0)[1][23] == {0, 1, *range(18, 24)}


# Decided by NVIDIA/kvpress @8bb29b9, `SimLayerKVPress` with `n_last=1`, of the vectors below: phase, prompt, sinks,
# recent, threshold -> whether the layer is lazy, which is then cut to the sinks and the newest keys.
PUBLISHED = [
    ((24, 60, 4, 12, 0.2), True),
    ((24, 60, 4, 12, 0.4), False),
    ((36, 60, 2, 9, 0.2), True),
    ((36, 60, 2, 9, 0.35), False),
    ((5, 40, 4, 10, 0.15), True),
    ((9, 50, 3, 8, 0.4), False),
]


@pytest.mark.parametrize(("case", "is_lazy"), PUBLISHED)
def test_layers_are_lazy_as_in_kvpress(case: tuple[int, int, int, int, float], is_lazy: bool) -> None:
    phase, prompt, sinks, recent, threshold = case
    rows = attention_of_waves(phase, prompt)
    spec = f"simlayerkv:rows=1,sinks={sinks},recent={recent},threshold={threshold}"
    simulation = run(parse_policy(spec), rows, [prompt], kv_heads=2, prompt=prompt, prefill="full")
    kept = {*range(sinks), *range(prompt - recent, prompt)} if is_lazy else set(range(prompt))
    assert head_sets(simulation, 0, 0)[1][-1] == kept


@pytest.mark.parametrize("setting", ["threshold=1.5", "rows=0", "sinks=-1", "recent=0"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"simlayerkv:{setting}")
