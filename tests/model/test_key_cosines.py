"""Cosines of keys: those of the whole sequence, whatever a cache holds, without a second copy of the cache."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from kvscope import trace
from kvscope.model.attention_hook import Call
from kvscope.model.call_parts import Heads
from kvscope.model.key_cosines import KeyCosines
from kvscope.model.pipeline import Pipeline, Write
from kvscope.model.recorder import Recorder
from tests.model.tiny import WINDOW, saved

GROUPS, SIZE, LENGTH = 2, 8, 40


@pytest.fixture
def keys() -> Tensor:
    """``[G, T, D]``; one of them is zero."""
    found = torch.randn(GROUPS, LENGTH, SIZE, generator=torch.Generator().manual_seed(4))
    found[1, 7] = 0
    return found


def expected(keys: Tensor) -> np.ndarray:
    """Return the cosines in double ``[G, T, T]``."""
    unit = keys.double().numpy()
    length = np.linalg.norm(unit, axis=-1, keepdims=True)
    unit = np.divide(unit, length, out=np.zeros_like(unit), where=length > 0)
    return unit @ unit.swapaxes(1, 2)


def call_of(keys: Tensor, count: int) -> Call:
    """Return a call with `count` new queries whose cache holds these keys ``[G, k, D]``; two heads share a key."""
    return Call(3, torch.zeros(1, 2 * GROUPS, count, SIZE), keys[None], keys[None], None, 1.0)


def found(keys: Tensor, blocks: list[int], held: int, heads: Heads | None = None) -> tuple[list[np.ndarray], int]:
    """Return the cosines of blocks of keys, and the most bytes kept after one; the cache drops all but `held` keys."""
    cosines, first, parts, kept = KeyCosines(heads), 0, [], 0
    for count in blocks:
        last = first + count
        call = call_of(keys[:, max(0, min(first, last - held)) : last], count)
        part = call if heads is None else heads.of(call)
        key = part.key[0, :, -count:].float()
        cosines.hold(call, last)
        parts.append(cosines.of(part, key, key.norm(dim=-1), first, last).float().numpy())
        kept = max(kept, sum(each.nbytes for each in vars(cosines).values() if isinstance(each, Tensor)))
        first = last
    return parts, kept


BLOCKS = [11, 1, 1, 20, 7]
HELD = {
    "all": LENGTH,
    "a window from the prompt on": 5,
    "a window from the fourth call on": 20,
    "all but one": LENGTH - 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [None, [2, 3]], ids=["all heads", "some heads"])
@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
def test_they_are_those_of_all_earlier_keys(
    keys: Tensor, held: int, heads: list[int] | None, dtype: torch.dtype
) -> None:
    keys = keys.to(dtype)
    parts, _ = found(keys, BLOCKS, held, None if heads is None else Heads(heads))
    whole, first = expected(keys), 0
    whole = whole if heads is None else whole[1:]
    for part, count in zip(parts, BLOCKS, strict=True):
        assert part.shape == (len(whole), count, first + count)
        assert np.allclose(part, whole[:, first : first + count, : first + count], atol=2**-11)
        first += count


def test_only_lengths_are_kept_where_the_cache_has_the_keys(keys: Tensor) -> None:
    """Directions in 32 bit would be as large as the keys and values of a 16-bit model together."""
    _, kept = found(keys, BLOCKS, LENGTH)
    assert kept == GROUPS * 256 * 4  # a buffer of 256 positions
    _, kept = found(keys, BLOCKS, 5)
    assert kept == GROUPS * 256 * 4 * (1 + SIZE)


def test_held_keys_are_those_of_the_cache_and_of_the_newest_call(keys: Tensor) -> None:
    """They take no memory of their own, and the first call that lacks some ends that."""
    cosines = KeyCosines()
    for last in (11, 12, 13):
        call = call_of(keys[:, :last], 1)
        cosines.hold(call, last)
        assert cosines._whole is not None and cosines._whole[0] is call.key
    cosines.hold(call_of(keys[:, 9:14], 1), 14)
    assert cosines._whole is not None and cosines._whole[0].shape[2] == 13


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_a_trace_has_those_of_all_keys_of_a_model(name: str, tmp_path: Path) -> None:
    """The prompt is longer than the window, and the model generates; vectors have every key as it came."""
    prompt, folder = tmp_path / "p.txt", str(saved(tmp_path / name, name))
    prompt.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    made = trace(folder, [prompt], output=tmp_path / "t", max_new_tokens=9, store="maps+vectors")
    assert made.sequences[0].length > 9 + WINDOW
    for layer in (0, 1):
        whole = expected(torch.from_numpy(made.states(0, layer).keys))
        assert np.allclose(made.similarity(0, layer), whole, atol=2**-11)


def test_a_recorder_reads_keys_before_a_cache_drops_them(keys: Tensor) -> None:
    """It holds those of the newest call alone, also while steps wait to be written together."""

    class Kept(Pipeline):
        def put(self, key: Hashable, write: Write, tensors: Mapping[str, Tensor]) -> None:
            if "cosines" in tensors:
                packed.append(tensors["cosines"].float())

    packed: list[Tensor] = []
    recorder = Recorder(Mock(), [3], pipeline=Kept())
    recorder.begin(0, 4)
    for first, last in ((0, 4), (0, 5), (0, 6), (0, 7), (4, 8), (5, 9)):  # the cache drops keys from the fifth call on
        call = call_of(keys[:, first:last], 4 if last == 4 else 1)
        recorder(call)
        held = recorder._layers[3].cosines._whole
        assert held is None if first else held is not None and held[0] is call.key, (
            "older keys take memory of their own"
        )
    recorder.end()
    whole = expected(keys)[:, :9, :9]
    rows = np.concatenate([whole[:, position, :position] for position in range(9)], 1)  # without itself
    assert np.allclose(torch.cat(packed, 1), rows, atol=2**-11)
