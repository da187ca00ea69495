"""Read files of captured attention: arrays by name, where layers and steps may be lists of arrays."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.trace.blocks import Array

ENDINGS = (".npz", ".npy", ".safetensors", ".pt", ".pth")
NAMES = ("attention", "attentions")
Captured: TypeAlias = "Array | list[Captured]"  # an array, or one for each layer, or for each step one for each layer


def read_captured(source: Path) -> dict[str, Captured]:
    """Return the arrays of a file by name; those of attention under a name of `NAMES`.

    Raises
    ------
    UsageError
        If the file does not exist, has another format or is damaged, or has no attention.
    """
    if not source.is_file():
        raise UsageError(f"no file {source}", f"Name a file of arrays: {', '.join(ENDINGS)}.")
    try:
        found = _load(source)
    except UsageError:
        raise
    except Exception as error:  # the readers raise many kinds of error for a damaged file
        raise UsageError(f"{source} cannot be read: {error}".splitlines()[0], _todo(source)) from error
    for name, value in found.items():
        for array in _arrays(value):
            if array.dtype.kind not in ("fiubU" if name == "tokens" else "fiub"):
                raise UsageError(
                    f"{source}: {name} has the type {array.dtype}", "Save it as numbers, float16 or float32."
                )
    if not any(name in found for name in NAMES):
        raise UsageError(
            f"{source} has no array called attention",
            f"Name the maps attention; the file contains: {', '.join(sorted(found)) or 'nothing'}.",
        )
    return found


def _arrays(value: Captured) -> Iterator[Array]:
    """Yield every array of a captured value."""
    if isinstance(value, np.ndarray):
        yield value
    else:
        for one in value:
            yield from _arrays(one)


def _load(source: Path) -> dict[str, Captured]:
    ending = source.suffix.lower()
    if ending == ".npz":
        with np.load(source, allow_pickle=False) as file:
            return _numbered({name: file[name] for name in file.files})
    if ending == ".npy":
        return {"attention": np.load(source, allow_pickle=False)}
    if ending == ".safetensors":
        return _load_safetensors(source)
    if ending in (".pt", ".pth"):
        return _load_torch(source)
    raise UsageError(f"{source} is none of {', '.join(ENDINGS)}", "Write the arrays with numpy.savez or safetensors.")


def _numbered(arrays: dict[str, Array]) -> dict[str, Captured]:
    """Return arrays, where those that numpy.savez was given without names are the attention, one array per layer."""
    if any(name in arrays for name in NAMES) or not arrays:
        return dict(arrays)
    numbered = [f"arr_{number}" for number in range(len(arrays))]
    if set(numbered) != set(arrays):
        return dict(arrays)
    return {"attention": arrays["arr_0"] if len(arrays) == 1 else [arrays[name] for name in numbered]}


def _load_safetensors(source: Path) -> dict[str, Captured]:
    from safetensors import safe_open

    with safe_open(source, framework="numpy") as file:
        names = list(file.keys())
        short = {name for name in names if file.get_slice(name).get_dtype() == "BF16"}
        return {name: _bfloat16(source, name) if name in short else file.get_tensor(name) for name in names}


def _bfloat16(source: Path, name: str) -> Array:
    """Return a bfloat16 array of a safetensors file, which NumPy has no type for, as float32 of the same values."""
    with source.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(size))[name]
        start, stop = about["data_offsets"]
        file.seek(8 + size + start)
        upper = np.frombuffer(file.read(stop - start), "<u2").astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(about["shape"])


def _load_torch(source: Path) -> dict[str, Captured]:
    """Return what `torch.save` wrote, if it is tensors in lists and dicts: other objects can run code."""
    import torch

    def plain(value: object) -> Captured:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(part) for part in value]
        return np.asarray(value)

    found = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        return {"attentions": plain(found)}
    return {str(name): plain(value) for name, value in found.items()}


def _todo(source: Path) -> str:
    if source.suffix.lower() in (".pt", ".pth"):
        return 'Save tensors in lists and dicts only: torch.save({"attentions": outputs.attentions}, FILE).'
    return "Write it again, as .npz or .safetensors."
