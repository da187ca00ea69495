"""A model's own index against its plain-loop reference; tests/model/test_indexer.py has the models themselves."""

from itertools import product

import pytest

from kvscope.policies.indexer import Indexer
from tests.engine.maps import attention, run
from tests.policies.vectors import sets
from tests.reference.policies.indexer import read


@pytest.mark.parametrize(("kv_heads", "prompt", "prefill"), list(product([1, 2, 4], [1, 3, 17], ["full", "stream"])))
def test_reads_equal_the_plain_loop(kv_heads: int, prompt: int, prefill: str) -> None:
    length, size = 31, 4 // kv_heads
    rows = attention(5, 2, 4, length, "sparse")
    rows[:, :, 20, 20] = 0  # the current key is not chosen, and counts as read
    simulation = run(Indexer(), rows, [length], kv_heads=kv_heads, prompt=prompt, prefill=prefill)
    visible = simulation.visible(0, length)
    first = prompt if prefill == "full" else 1
    for layer, head in product(range(2), range(kv_heads)):
        group = rows[layer, head * size : (head + 1) * size].numpy()
        expected = [set(range(t + 1)) if t < first else read(group[:, t, : t + 1]) for t in range(length)]
        assert sets(visible[0, layer, head]) == expected
    assert simulation.held(0, length).sum(-1)[0, 0, 0].tolist() == list(range(1, length + 1)), (
        "a reader holds everything"
    )
