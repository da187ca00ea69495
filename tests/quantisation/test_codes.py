"""Codes of keys and values, compared with loops over numbers that store integer codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.cache_scheme import CacheScheme, parse_cache
from kvscope.quantisation.codes import code_fp8, code_keys, code_values
from tests.reference import quantisation as plain

SCHEMES = [
    "int2:kivi(group=3,residual=3)",
    "int4:kivi(group=4,residual=8)",
    "int8:kivi(group=5,residual=5)",
    "int3:kvquant(group=4,outliers=10%)",
    "int4:kvquant(group=2,outliers=0%)",
    "int4:quanto(group=4)",
]


def scheme_of(text: str) -> CacheScheme:
    found = parse_cache(text)
    assert found is not None
    return found


def vectors(seed: int, *size: int) -> torch.Tensor:
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made * torch.linspace(0.1, 20, size[-1], dtype=torch.float64) + 1  # channels of different sizes


@pytest.mark.parametrize("text", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), keys=st.integers(1, 14), size=st.integers(3, 9))
def test_keys_per_channel(text: str, seed: int, keys: int, size: int) -> None:
    """Members of two heads that hold different keys are quantised in groups of their own; the others stay."""
    scheme, key = scheme_of(text), vectors(seed, 2, keys, size)
    members = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
    found = code_keys(key, members, scheme)
    for head in range(2):
        places = members[head].nonzero()[:, 0].tolist()
        assert torch.equal(found.read[head, ~members[head]], key[head, ~members[head]])
        assert (found.group[head] >= 0).tolist() == members[head].tolist()
        for number, start in enumerate(range(0, len(places), scheme.group)):
            group = places[start : start + scheme.group]
            read, outliers = plain.coded_group([key[head, each].tolist() for each in group], scheme)
            assert torch.allclose(found.read[head, group], torch.tensor(read, dtype=torch.float64), rtol=0, atol=1e-12)
            assert found.group[head, group].tolist() == [number] * len(group)
            assert found.outliers[head, group].tolist() == outliers


@pytest.mark.parametrize("text", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(3, 40))
def test_values_per_token(text: str, seed: int, size: int) -> None:
    scheme, value = scheme_of(text), vectors(seed, 3, size)
    read, outliers = code_values(value, scheme, value.dtype)
    for each in range(3):
        expected, count = plain.coded_value(value[each].tolist(), scheme)
        assert torch.allclose(read[each], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
        assert int(outliers[each]) == count


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 9))
def test_fp8(seed: int, size: int) -> None:
    value = vectors(seed, 2, size)
    for each, read in zip(value, code_fp8(value), strict=True):
        assert torch.allclose(
            read, torch.tensor(plain.coded_fp8(each.tolist()), dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_every_number_of_e4m3_is_its_own_code() -> None:
    numbers = torch.tensor(plain.E4M3)
    assert len(plain.E4M3) == 253 and torch.equal(numbers.to(torch.float8_e4m3fn).to(torch.float32), numbers)
    between = (numbers[1:] + numbers[:-1]).double() / 2
    assert between.float().to(torch.float8_e4m3fn).double().tolist() == [plain.e4m3(one) for one in between.tolist()]


def test_equal_numbers_and_zeros_are_read_back() -> None:
    same = torch.full((1, 6, 4), 2.5, dtype=torch.float64)
    everyone = torch.ones(1, 6, dtype=torch.bool)
    for text in SCHEMES:
        assert torch.equal(code_keys(same, everyone, scheme_of(text)).read, same)
        assert torch.equal(code_values(same * 0, scheme_of(text), same.dtype)[0], same * 0)
    assert torch.equal(code_fp8(same * 0), same * 0)


def test_more_bits_are_nearer() -> None:
    key, everyone = vectors(0, 1, 64, 16), torch.ones(1, 64, dtype=torch.bool)
    for kind in ("kivi", "kvquant"):
        errors = [
            float((code_keys(key, everyone, scheme_of(f"int{bits}:{kind}")).read - key).abs().mean())
            for bits in (8, 4, 3, 2)
        ]
        assert errors == sorted(errors) and errors[0] < errors[-1] / 10


def test_a_channel_of_outliers_costs_its_own_scale_only() -> None:
    """Keys per channel: one channel with large numbers does not make the codes of the others coarse."""
    key = vectors(1, 1, 32, 8)
    large = key.clone()
    large[..., 3] *= 1000
    everyone, scheme = torch.ones(1, 32, dtype=torch.bool), scheme_of("int4:kivi")
    one, other = code_keys(key, everyone, scheme).read, code_keys(large, everyone, scheme).read
    rest = [channel for channel in range(8) if channel != 3]
    assert torch.equal(one[..., rest], other[..., rest])
