"""Regret against plain loops: sums, the steps at which keys were wanted, lags, kinds of tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.analysis.missed_attention import BINS, MOST, MissedAttention, MissedAttentionCounter
from kvscope.analysis.regret import RegretCollector
from kvscope.analysis.token_kinds import KINDS, TokenKinds
from kvscope.core.residency import ResidencyIntervals
from tests.reference import regret as twin
from tests.reference.residency import Stay


def stays_of(seed: int, heads: int, length: int, back: bool) -> list[Stay]:
    """Return stays in which every key enters at its position; with `back`, keys come and go."""
    random = np.random.default_rng(seed)
    found: list[Stay] = []
    for head in range(heads):
        for key in range(length):
            enter = key
            while True:
                leave = int(random.integers(enter, length + 4)) if random.random() < 0.8 else length
                found.append((head, key, enter, leave if leave < length else None))
                if leave >= length - 1 or not back or random.random() < 0.4:
                    break
                enter = int(random.integers(leave + 1, length))
    return found


def intervals_of(stays: list[Stay], heads: int, length: int) -> ResidencyIntervals:
    columns = np.array([(h, k, e, -1 if gone is None else gone) for h, k, e, gone in stays], np.int64).T
    head, key, enter, leave = columns
    return ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=heads, length=length)


def missed(rows: np.ndarray, stays: list[Stay], block: int) -> MissedAttention:
    heads, length = rows.shape[:2]
    found = MissedAttentionCounter(intervals_of(stays, heads, length))
    for start in range(0, length, block):
        stop = min(start + block, length)
        found.add(start, rows[:, start:stop, :stop])
    return found.result()


def causal(seed: int, heads: int, length: int, ties: bool) -> np.ndarray:
    rows = np.random.default_rng(seed).random((heads, length, length)) * np.tri(length)
    return np.round(rows * 4) / 4 if ties else rows


@given(
    seed=st.integers(0, 10_000),
    heads=st.integers(1, 3),
    length=st.integers(1, 14),
    back=st.booleans(),
    ties=st.booleans(),
    block=st.integers(1, 14),
)
@settings(max_examples=120, deadline=None)
def test_what_was_missed_equals_the_plain_loop(seed, heads, length, back, ties, block) -> None:
    rows, stays = causal(seed, heads, length, ties), stays_of(seed, heads, length, back)
    got, expected = missed(rows, stays, block), twin.regret(rows.tolist(), stays)
    for head in range(heads):
        for key in range(length):
            own = expected[head][key]
            assert got.mass[head, key] == pytest.approx(own.mass)
            most = own.most(MOST) + [(0.0, -1, -1)] * (MOST - len(own.most(MOST)))
            place = (slice(None), head, key)
            assert list(zip(got.weight[place], got.step[place], got.evicted_at[place], strict=True)) == most
    assert got.lags == pytest.approx(np.sum([twin.lags(keys, BINS) for keys in expected], 0))


def test_a_policy_that_keeps_everything_regrets_nothing() -> None:
    rows = causal(1, 2, 9, False)
    got = missed(rows, [(head, key, key, None) for head in range(2) for key in range(9)], 4)
    assert not got.mass.any() and not got.lags.any()
    assert (got.step == -1).all()
    collected = RegretCollector(5)
    collected.add(0, 0, got)
    found = collected.result({0: TokenKinds(["a"] * 9)}, 18)
    assert found["mass"] == 0 and found["worst"] == found["tokens"] == found["lags"] == []
    assert [each["kind"] for each in found["kinds"]] == list(KINDS)


def test_the_worst_of_all_layers_and_what_they_add_up_to() -> None:
    length, texts = 12, ["The", " king", "\n", " said", " 4", "821", ".", " said", "", " Ünder", "  ", "½"]
    collected, every = RegretCollector(4), []
    for sequence in (0, 1):
        for layer in (0, 3):
            rows = causal(10 * sequence + layer, 2, length, False)
            stays = stays_of(10 * sequence + layer, 2, length, layer == 3)
            collected.add(sequence, layer, missed(rows, stays, 5))
            for head, keys in enumerate(twin.regret(rows.tolist(), stays)):
                every += [(own.mass, sequence, layer, head, key, own) for key, own in enumerate(keys) if own.mass > 0]
    spans = {"needle": [4, 5], "fact": [5, 6, 7]}
    found = collected.result({0: TokenKinds(texts, spans), 1: TokenKinds(texts, {"needle": [1]})}, 100)
    total = sum(each[0] for each in every)
    assert found["mass"] == pytest.approx(total)
    assert found["per_step"] == pytest.approx(total / 100)
    every.sort(key=lambda each: -each[0])
    for got, (mass, sequence, layer, head, key, own) in zip(found["worst"], every[:4], strict=True):
        assert (got["sequence"], got["layer"], got["kv_head"], got["key"]) == (sequence, layer, head, key)
        assert got["mass"] == pytest.approx(mass)
        weight, step, gone = own.most(1)[0]
        assert (got["wanted"][0], got["gone"], got["lag"]) == (step, gone, step - gone)
        assert got["weights"][0] == pytest.approx(weight)
        assert got["text"] == texts[key]
    for each in found["tokens"]:
        own_mass = [e[0] for e in every if (e[1], e[4]) == (each["sequence"], each["key"])]
        assert each["mass"] == pytest.approx(sum(own_mass)) and each["heads"] == len(own_mass)
        assert each["share"] == pytest.approx(sum(own_mass) / total)
    assert [each["mass"] for each in found["tokens"]] == sorted((e["mass"] for e in found["tokens"]), reverse=True)
    assert sum(each["mass"] for each in found["kinds"]) == pytest.approx(total)
    assert sum(each["tokens"] for each in found["kinds"]) == 2 * length
    inside = {"needle": [(0, 4), (0, 5), (1, 1)], "fact": [(0, 5), (0, 6), (0, 7)]}
    assert [(each["name"], each["tokens"]) for each in found["spans"]] == [("needle", 3), ("fact", 3)]
    for each in found["spans"]:
        mass = sum(e[0] for e in every if (e[1], e[4]) in inside[each["name"]])
        assert each["mass"] == pytest.approx(mass) and each["share"] == pytest.approx(mass / total)
        assert each["mass_per_token"] == pytest.approx(mass / 3)
    assert sum(each["mass"] for each in found["lags"]) == pytest.approx(total)
    assert sum(each["keys"] for each in found["lags"]) == len(every)


def test_kinds_of_tokens() -> None:
    texts = ["4", " king", "\n", " said", " 4", "821", ".", "said", "", " Ünder", "  ", "½"]
    assert TokenKinds(texts).kinds == [
        "first", "rare", "punctuation", "other", "digits", "digits", "punctuation", "other", "other", "rare",
        "punctuation", "punctuation",
    ]  # fmt: skip


def test_a_token_is_shown_with_its_neighbours() -> None:
    tokens = TokenKinds(list("abcdefghij"))
    assert tokens.named(5) == {"text": "f", "kind": "rare", "span": None, "before": "bcde", "after": "ghij"}
    named = TokenKinds(list("abcd"), {"needle": [1, 2], "fact": [2]})
    assert [named.named(key)["span"] for key in range(4)] == [None, "needle", "needle, fact", None]
    assert tokens.named(0)["before"] == "" and tokens.named(9)["after"] == ""


def test_lags_fall_into_powers_of_two() -> None:
    """A key that goes after step 0 and is wanted with weight 1 at every step has lags 1, 2, 3, ..."""
    length = 40
    rows = np.zeros((1, length, length))
    rows[0, :, 0] = 1.0
    stays: list[Stay] = [(0, 0, 0, 0)] + [(0, key, key, None) for key in range(1, length)]
    got = missed(rows, stays, 7)
    assert got.lags[:7].tolist() == [1, 2, 4, 8, 16, 8, 0]  # 39 steps
    assert got.mass[0, 0] == length - 1
