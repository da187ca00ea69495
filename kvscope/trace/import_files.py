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
from kvscope.trace.import_limit import KNOWN, ArraySizes, require_npy, require_npz, require_torch

ENDINGS = (".npz", ".npy", ".safetensors", ".pt", ".pth")
NAMES = ("attention", "attentions")
OBJECT = 256  # bytes of memory that anything in a list takes at least, beside its numbers
Captured: TypeAlias = "Array | list[Captured]"  # an array, or one for each layer, or for each step one for each layer


def read_captured(source: Path) -> dict[str, Captured]:
    """Return the known arrays of a file by name; those of attention under a name of `NAMES`.

    Raises
    ------
    UsageError
        If the file does not exist, has another format or is damaged, has no attention, or its arrays are far larger
        than it is (see `kvscope.trace.import_limit`).
    """
    if not source.is_file():
        raise UsageError(f"no file {source}", f"Name a file of arrays: {', '.join(ENDINGS)}.")
    try:
        names, found = _load(source)
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
            f"Name the maps attention; the file contains: {', '.join(sorted(names)) or 'nothing'}.",
        )
    return found


def _arrays(value: Captured) -> Iterator[Array]:
    """Yield every array of a captured value."""
    if isinstance(value, np.ndarray):
        yield value
    else:
        for one in value:
            yield from _arrays(one)


def _load(source: Path) -> tuple[list[str], dict[str, Captured]]:
    """Return the names of all arrays of a file, and the known ones."""
    ending = source.suffix.lower()
    if ending == ".npz":
        require_npz(source)
        with np.load(source, allow_pickle=False) as file:
            return list(file.files), _numbered({name: file[name] for name in file.files if KNOWN.fullmatch(name)})
    if ending == ".npy":
        require_npy(source)
        return ["attention"], {"attention": np.load(source, allow_pickle=False)}
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


def _load_safetensors(source: Path) -> tuple[list[str], dict[str, Captured]]:
    """Return names and known arrays; the library checks that they are exactly as large as the file says."""
    from safetensors import safe_open

    with safe_open(source, framework="numpy") as file:
        every = list(file.keys())
        names = [name for name in every if KNOWN.fullmatch(name)]
        short = {name for name in names if file.get_slice(name).get_dtype() == "BF16"}
        known = {name: _bfloat16(source, name) if name in short else file.get_tensor(name) for name in names}
        return every, known


def _bfloat16(source: Path, name: str) -> Array:
    """Return a bfloat16 array of a safetensors file, which NumPy has no type for, as float32 of the same values."""
    with source.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        about = json.loads(file.read(size))[name]
        start, stop = about["data_offsets"]
        file.seek(8 + size + start)
        upper = np.frombuffer(file.read(stop - start), "<u2").astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(about["shape"])


def _load_torch(source: Path) -> tuple[list[str], dict[str, Captured]]:
    """Return what `torch.save` wrote, if it is tensors in lists and dicts: other objects can run code."""
    import torch

    sizes = ArraySizes(source)

    def plain(value: object) -> Captured:
        if isinstance(value, torch.Tensor):
            # A view can have more numbers than are stored, and a list the same part many times.
            sizes.add(value.numel() * max(value.element_size(), 4 if value.dtype == torch.bfloat16 else 1))
            value = value.detach()
            return np.asarray((value.float() if value.dtype == torch.bfloat16 else value).numpy())
        sizes.add(OBJECT)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(part) for part in value]
        return np.asarray(value)

    require_torch(source)
    found = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        return ["attentions"], {"attentions": plain(found)}
    every = {str(name): value for name, value in found.items()}
    return list(every), {name: plain(value) for name, value in every.items() if KNOWN.fullmatch(name)}


def _todo(source: Path) -> str:
    if source.suffix.lower() in (".pt", ".pth"):
        return 'Save tensors in lists and dicts only: torch.save({"attentions": outputs.attentions}, FILE).'
    return "Write it again, as .npz or .safetensors."
