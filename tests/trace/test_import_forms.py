"""Captured attention in the forms in which people save it: what is assumed is stored, and padding is removed."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvscope.core.errors import UsageError
from kvscope.trace.importer import import_maps
from kvscope.trace.reader import Trace
from tests.trace.make import rows_of

L, B, H, T = 3, 2, 4, 6


def maps(length: int = T, batch: int = B) -> np.ndarray:
    """Return attention ``[L, B, H, T, T]``, each layer and sequence with rows of its own."""
    return np.stack(
        [np.stack([rows_of(10 * layer + one, H, length) for one in range(batch)]) for layer in range(L)]
    ).astype(np.float32)


def imported(tmp_path: Path, name: str = "t", **options: Any) -> Trace:
    return import_maps(next(tmp_path.glob("maps.*")), None, tmp_path / name, **options)


def npz(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "maps.npz", **arrays)
    return tmp_path


def assert_is(trace: Trace, expected: np.ndarray) -> None:
    """Check a trace against attention ``[L, B, H, T, T]``."""
    assert (len(trace.layers), len(trace.sequences), trace.heads) == expected.shape[:3]
    for layer in range(len(expected)):
        for sequence in range(expected.shape[1]):
            assert np.allclose(trace.attention(sequence, layer), expected[layer, sequence], atol=5e-4)


@pytest.mark.parametrize("axes", ["LBHTT", "BLHTT", "HLBTT", "slhtt", "LBHQK", "LBHKQ", "BKHLQ"])
def test_axes_are_named(tmp_path: Path, axes: str) -> None:
    letters = axes.upper().replace("S", "B").replace("T", "Q", 1).replace("T", "K", 1)
    array = maps().transpose(["LBHQK".index(letter) for letter in letters])
    values = np.random.default_rng(0).random((L, B, 2, T)).astype(np.float32)
    own = letters.replace("K", "")
    ordered = values.transpose(["LBHQ".index(letter) for letter in own])
    trace = imported(npz(tmp_path, attention=array, value_l1=ordered), axes=axes)
    assert_is(trace, maps())
    assert trace.kv_heads == 2
    assert np.allclose(trace.value_norms(1, 2, "l1"), values[2, 1])
    assert not any("axes" in line for line in trace.header.assumed)


def test_one_sequence_or_one_layer(tmp_path: Path) -> None:
    assert_is(imported(npz(tmp_path, attention=maps()[:, 0]), "a", axes="LHTT"), maps()[:, :1])
    assert_is(imported(npz(tmp_path, attention=maps()[0]), "b", axes="BHTT"), maps()[:1])
    assert_is(imported(npz(tmp_path, attention=maps()[0, 0]), "c", axes="HTT"), maps()[:1, :1])


def test_what_is_assumed_is_stored(tmp_path: Path) -> None:
    trace = imported(npz(tmp_path, attentions=maps()), "a")
    assert_is(trace, maps())
    assert trace.header.assumed == [
        "the axes of attentions, [3, 2, 4, 6, 6], are LBHTT: 3 layers of 2 sequences with 4 heads",
        "each query head has keys and values of its own; otherwise give --kv-heads",
        "the whole sequence is the prompt; otherwise give --prompt-length",
    ]
    assert json.loads((tmp_path / "a/trace.json").read_text())["assumed"] == trace.header.assumed
    given = imported(tmp_path, "b", axes="LBHTT", kv_heads=2, prompt_length=4)
    assert given.header.assumed == [] and given.kv_heads == 2 and given.sequences[1].prompt == 4
    assert "assumed" not in json.loads((tmp_path / "b/trace.json").read_text())
    trace = imported(npz(tmp_path, attention=maps()[:, :1]), "c")
    assert trace.header.assumed[0].endswith("; for layers of one sequence give --axes LBHTT")


def test_outputs_of_forward_in_torch(tmp_path: Path) -> None:
    torch.save(tuple(torch.from_numpy(maps())), tmp_path / "maps.pt")
    assert_is(imported(tmp_path, "a"), maps())
    half = {"attentions": torch.from_numpy(maps()).bfloat16(), "input_ids": torch.arange(B * T).view(B, T)}
    torch.save(half, tmp_path / "maps.pt")
    trace = imported(tmp_path, "b")
    assert np.allclose(trace.attention(1, 2), maps()[2, 1], atol=4e-3)
    assert trace.tokens(1)["token_id"].tolist() == list(range(T, 2 * T))


def test_steps_of_generate_in_torch(tmp_path: Path) -> None:
    prompt = 3
    whole = torch.from_numpy(maps())
    steps = [tuple(layer[:, :, :prompt, :prompt] for layer in whole)]
    steps += [tuple(layer[:, :, at : at + 1, : at + 1] for layer in whole) for at in range(prompt, T)]
    torch.save(
        {"attentions": tuple(steps), "sequences": torch.arange(B * (T + 1)).view(B, T + 1)}, tmp_path / "maps.pt"
    )
    trace = imported(tmp_path, "a")
    assert_is(trace, maps())
    assert [(one.prompt, one.length) for one in trace.sequences] == [(prompt, T)] * B
    assert trace.tokens(0)["token_id"].tolist() == list(range(T))
    assert any("4 steps of generation, each with 3 layers" in line for line in trace.header.assumed)
    torch.save([steps[0], tuple(layer[..., 1:] for layer in steps[1])], tmp_path / "maps.pt")
    with pytest.raises(UsageError, match="layer 0: step 1 has 3 keys, and 4 tokens were read"):
        imported(tmp_path, "b")


def test_objects_in_torch_files_are_refused(tmp_path: Path) -> None:
    torch.save({"attentions": torch.from_numpy(maps()), "other": Path("a")}, tmp_path / "maps.pt")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        imported(tmp_path)
    assert "lists and dicts only" in caught.value.todo


def test_bfloat16_in_safetensors(tmp_path: Path) -> None:
    save_file(
        {"attention": torch.from_numpy(maps()[:, 0]).bfloat16(), "value_l1": torch.ones(L, 2, T)},
        tmp_path / "maps.safetensors",
    )
    trace = imported(tmp_path)
    expected = torch.from_numpy(maps()[2, 0]).bfloat16().float().numpy()
    assert np.allclose(trace.attention(0, 2), expected, atol=5e-4)
    assert trace.kv_heads == 2


def test_layers_without_names_in_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "maps.npz", *maps())
    assert_is(imported(tmp_path, "a"), maps())
    np.savez(tmp_path / "maps.npz", maps()[:, 0])
    assert_is(imported(tmp_path, "b"), maps()[:, :1])


def padded(left: int, right: int) -> np.ndarray:
    """Return ``[L, B, H, T, T]`` whose second sequence is padded: its rows of padding are not attention."""
    array = maps()
    inner = T - left - right
    array[:, 1] = np.nan
    array[:, 1, :, left : T - right] = 0
    array[:, 1, :, left : T - right, left : T - right] = maps(inner)[:, 1]
    return array


@pytest.mark.parametrize(("left", "right"), [(2, 0), (0, 2), (1, 1)])
def test_padding_is_removed(tmp_path: Path, left: int, right: int) -> None:
    mask = np.array([[1] * T, [0] * left + [1] * (T - left - right) + [0] * right])
    tokens, norms = np.arange(B * T).reshape(B, T), np.random.default_rng(0).random((L, B, H, T), np.float32)
    npz(
        tmp_path,
        attentions=padded(left, right),
        attention_mask=mask,
        tokens=tokens,
        key_l2=norms,
        prompt_length=np.array([4, 4]),
    )
    trace = imported(tmp_path)
    inner = T - left - right
    assert [(one.prompt, one.length) for one in trace.sequences] == [(4, T), (min(4, T - right) - left, inner)]
    assert np.allclose(trace.attention(1, 2), maps(inner)[2, 1], atol=5e-4)
    assert np.allclose(trace.attention(0, 2), maps()[2, 0], atol=5e-4)
    assert trace.tokens(1)["token_id"].tolist() == tokens[1, left : T - right].tolist()
    assert np.allclose(trace.key_norms(1, 2), norms[2, 1, :, left : T - right])
    assert f"sequence 1: {left + right} tokens of padding are removed" in trace.header.assumed


def test_a_mask_of_the_prompt(tmp_path: Path) -> None:
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    trace = imported(npz(tmp_path, attentions=padded(1, 0), attention_mask=mask))
    assert [(one.prompt, one.length) for one in trace.sequences] == [(4, T), (3, T - 1)]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"attention_mask": np.array([[1, 0, 1, 1, 1, 1]] * B)}, {}, "sequence 0 excludes inner tokens"),
        ({"attention_mask": np.zeros((B, T))}, {}, "sequence 0 excludes all tokens"),
        ({"attention_mask": np.ones((3, T))}, {}, r"attention_mask has the shape \[3, 6\]"),
        ({"value_l1": np.ones((L, 3, H, T))}, {}, r"value_l1 has the shape \[3, 3, 4, 6\]"),
        ({"tokens": np.ones((B, 4))}, {}, "tokens has the shape"),
        ({"prompt_length": np.array([1, 2, 3])}, {}, "3 numbers for 2 sequences"),
        ({"value_l1": np.ones((L, B, 2, T))}, {"kv_heads": 4}, "have 2 key/value heads, not 4"),
        ({}, {"kv_heads": 3}, "do not share 3 key/value heads"),
        ({}, {"axes": "LBHT"}, "axes 'LBHT' are not those of attention"),
        ({}, {"axes": "LBXTT"}, "axes 'LBXTT'"),
        ({}, {"axes": "LLHTT"}, "axes 'LLHTT'"),
        ({}, {"axes": "LHTT"}, r"attentions has the shape \[3, 2, 4, 6, 6\]"),
        ({}, {"axes": "TTLBH"}, r"attention has the shape"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, arrays: dict, options: dict, message: str) -> None:
    npz(tmp_path, attentions=maps(), **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        imported(tmp_path, **options)
    assert caught.value.todo
    assert not (tmp_path / "t").exists()


def test_a_length_given_as_the_prompt(tmp_path: Path) -> None:
    npz(tmp_path, attentions=maps())
    with pytest.raises(UsageError, match="--prompt 20 is a number, not a text") as caught:
        import_maps(tmp_path / "maps.npz", "20", tmp_path / "t")
    assert "--prompt-length 20" in caught.value.todo
    with pytest.raises(UsageError, match="--prompt contains half a character"):
        import_maps(tmp_path / "maps.npz", "\ud83d", tmp_path / "t")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        import_maps(tmp_path / "maps.npz", str(tmp_path / "p.txt"), tmp_path / "t")


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("maps.pt", "maps.npy", "maps.safetensors"):
        (tmp_path / name).write_bytes(struct.pack("<Q", 5) + b"\x00" * 20)
        with pytest.raises(UsageError, match="cannot be read"):
            import_maps(tmp_path / name, None, tmp_path / "t")


@pytest.mark.parametrize("name", ["value_l1", "value_l2", "key_l2"])
def test_a_negative_norm_is_refused(tmp_path: Path, name: str) -> None:
    attention = np.tile(np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None], (L, 2, 1, 1)).astype(np.float32)
    norms = np.ones((L, 2, T), np.float32)
    norms[1, 0, 2] = -1
    with pytest.raises(UsageError, match=f"{name} contains a negative norm"):
        imported(npz(tmp_path, attention=attention, **{name: norms}))
