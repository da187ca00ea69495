"""The files of a model in a local folder: which hold its weights, and whether they are whole.

Pickled weights (``pytorch_model.bin``) are read by torch's restricted reader, which makes tensors and plain containers
only and refuses a pickle that calls anything else, so that no file can run code.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from kvscope.core.errors import ModelError
from kvscope.model.explain import fetch, first_line

CONFIG = "config.json"
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # added to the name of the weights where they are in several files
AGAIN = "Download it again."


def require_files(folder: Path) -> bool:
    """Return whether the weights of a local folder are in safetensors, or else pickled; every file is opened.

    Raises
    ------
    ModelError
        If there is no configuration, there are no weights, a file is missing or damaged, or a pickle could run code.
    """
    todo = f"Name the folder of a model, or download one into it: {fetch(str(folder))}"
    if not (folder / CONFIG).is_file():
        raise ModelError(f"folder {folder} has no {CONFIG}, so it is not a model", todo)
    for name, check in ((SAFETENSORS, check_safetensors), (PICKLED, check_pickled)):
        for file in _weight_files(folder, name):
            check(file)
        if _exists(folder, name):
            return name == SAFETENSORS
    others = sorted(
        file.name
        for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth")
        for file in folder.glob(kind)
        if file.is_file()
    )
    if others:
        raise ModelError(
            f"folder {folder} has neither {SAFETENSORS} nor {PICKLED} nor an index of several files, only {others[0]}",
            f"Save the model with save_pretrained of transformers, or download it: {fetch(str(folder))}",
        )
    raise ModelError(f"folder {folder} has no weights, neither {SAFETENSORS} nor {PICKLED}", todo)


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights that transformers looks for, in safetensors or pickled."""
    return _exists(folder, SAFETENSORS) or _exists(folder, PICKLED)


def _exists(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / (name + INDEX)).is_file()


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Return the files that hold the weights: one, or those that the index names; none if there is neither."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / (name + INDEX)
    if not index.is_file():
        return []
    try:
        read = json.loads(index.read_text(encoding="utf-8"))
        named = sorted(set(read["weight_map"].values()))
        read["metadata"].keys()  # transformers does not load without them
        files = [folder / part for part in named]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: it does not say which file holds which weight", AGAIN) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"folder {folder} lacks {len(missing)} of the {len(files)} files of its weights, among them {missing[0]}",
            f"Download the whole model: {fetch(str(folder))}",
        )
    return files


def check_safetensors(file: Path) -> None:
    """Raise ModelError unless a safetensors file is whole."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or truncated: {first_line(error)}", AGAIN) from error


def check_pickled(file: Path) -> None:
    """Raise ModelError unless a pickled file holds tensors in plain containers; only its structure is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about versions of pickle, which the error below covers
            torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        if called is None:
            raise ModelError(f"{file} is damaged, or contains something other than tensors", AGAIN) from error
        raise ModelError(
            f"{file} is a pickle that calls {called[1]}, which could run code: it was not loaded",
            "Get the model in safetensors from its publisher.",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ModelError(f"{file} is damaged or truncated: {first_line(error)}", AGAIN) from error
