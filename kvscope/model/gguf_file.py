"""Models in GGUF, the format of llama.cpp: one file with configuration, tokenizer and weights.

transformers reads them; quantised weights become plain numbers at loading, so that a trace is of the very weights that
the file holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib import import_module
from io import StringIO
from pathlib import Path

import transformers

from kvscope.core.errors import ModelError
from kvscope.model.explain import first_line
from kvscope.model.weight_files import AGAIN, has_weights

SUFFIX = ".gguf"
PROJECTOR = "mmproj"  # a file whose name starts so is the image encoder of a model, not a model
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def gguf_of(source: str) -> Path | None:
    """Return the GGUF file that a source names, or the only one in a folder that has no other weights; otherwise None.

    Raises
    ------
    ModelError
        If a folder has several, or the model is divided among several files.
    """
    place = Path(source)
    if place.is_file():
        found = [place]
    elif not place.is_dir() or has_weights(place):
        return None
    else:
        found = sorted(file for file in place.glob(f"*{SUFFIX}") if not file.name.startswith(PROJECTOR))
    if not found:
        return None
    parts = _PART.search(found[0].name)
    if parts is not None and int(parts[1]) > 1:
        merged = found[0].with_name(_PART.sub(SUFFIX, found[0].name))
        raise ModelError(
            f"{found[0]} is one of {int(parts[1])} parts of a model, which transformers cannot read",
            f"Merge them: llama-gguf-split --merge {found[0]} {merged}",
        )
    if len(found) > 1:
        raise ModelError(f"folder {source} has {len(found)} {SUFFIX} files", f"Name one of them: --model {found[0]}")
    return found[0]


def place_of(source: str) -> tuple[str, dict[str, str]]:
    """Return where transformers looks for a model, and the argument that names a GGUF file there, if it is one."""
    file = gguf_of(source)
    return (source, {}) if file is None else (str(file.parent), {"gguf_file": file.name})


def quantization_of(file: Path) -> str:
    """Return how a GGUF file holds most of its numbers, ``gguf Q8_0``.

    Raises
    ------
    ModelError
        If the package that reads such files is missing, or the file is damaged.
    """
    try:
        reader = import_module("gguf").GGUFReader(file)
    except ImportError as error:
        raise ModelError(
            f"{file} needs the package {error.name}, which is not installed", 'Install it: pip install "kvscope[gguf]"'
        ) from error
    except Exception as error:  # it raises whatever its parsing meets in a damaged file
        raise ModelError(f"{file} is damaged or truncated: {first_line(error)}", AGAIN) from error
    numbers: Counter[str] = Counter()
    for tensor in reader.tensors:
        numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    if not numbers:
        raise ModelError(f"{file} has no weights", "Name the file of a model.")
    return f"gguf {numbers.most_common(1)[0][0]}"


def as_numbers() -> dict[str, object]:
    """Return the argument with which transformers turns blocks of quantised weights into numbers at loading."""
    made = getattr(transformers, "GgufConfig", None)  # versions that do not have it always do so
    return {} if made is None else {"quantization_config": made(dequantize=True)}


@contextmanager
def without_bars(file: Path | None) -> Iterator[None]:
    """Hide what is written to stderr while a GGUF file is loaded: progress bars that no setting turns off."""
    with nullcontext() if file is None else redirect_stderr(StringIO()):
        yield
