"""Adapters of PEFT: small changes (LoRA and others) of a base model, which are added to its weights at loading."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from kvscope.core.errors import KvscopeError, ModelError
from kvscope.core.model_types import CausalModel
from kvscope.model.explain import HttpError, explained
from kvscope.model.weight_files import AGAIN, CONFIG, check_pickled, check_safetensors, has_weights

T = TypeVar("T")
ADAPTER = "adapter_config.json"
FILES = {"adapter_model.safetensors": check_safetensors, "adapter_model.bin": check_pickled}
VIRTUAL_TOKENS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")
_OF_HUB = ["adapter_*", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja"]


def adapter_of(source: str, revision: str | None, *, offline: bool) -> Path | None:
    """Return the folder of an adapter; None if a folder or Hub id is a model of its own.

    Raises
    ------
    ModelError
        If a folder holds both: whether transformers would apply the adapter depends on the packages installed.
    """
    folder = Path(source)
    if folder.exists():
        if not (folder / ADAPTER).is_file():
            return None
        if has_weights(folder):
            raise ModelError(
                f"folder {source} holds a whole model and an adapter of another one",
                f"Name a folder with one of them: remove {ADAPTER}, or the model's weights.",
            )
        return folder
    if isinstance(try_to_load_from_cache(source, CONFIG, revision=revision), str):
        return None
    try:
        hf_hub_download(source, ADAPTER, revision=revision, local_files_only=offline)
    except (HfHubHTTPError, HttpError, OSError, ValueError):
        return None  # no adapter; if there is no model either, loading its configuration says why
    return Path(snapshot_download(source, revision=revision, allow_patterns=_OF_HUB, local_files_only=offline))


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the name and the revision of the model that an adapter changes, after a look at all of its files.

    Raises
    ------
    ModelError
        If a file is missing or damaged, no base model is named, or the adapter's kind cannot be added to weights.
    """
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, revision, kind = (config.get(key) for key in ("base_model_name_or_path", "revision", "peft_type"))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder / ADAPTER} is damaged: it is not a JSON object", AGAIN) from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder / ADAPTER} names no base model", "Write its folder or Hub id in base_model_name_or_path."
        )
    if kind in VIRTUAL_TOKENS:
        raise ModelError(
            f"adapter {folder} of type {kind} adds keys that belong to no token of the prompt",
            "Trace its base model, or an adapter that changes weights, such as LoRA.",
        )
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        raise ModelError(f"adapter {folder} has no weights, neither {' nor '.join(FILES)}", AGAIN)
    FILES[found[0]](folder / found[0])
    beside = folder / base
    here = (Path(base) / "config.json").is_file()  # a folder of that name may be anything
    return (str(beside) if not here and beside.is_dir() else base), revision


def require_peft(source: str) -> None:
    """Raise ModelError if the package that reads adapters is not installed."""
    try:
        import_module("peft")
    except ImportError as error:
        raise ModelError(
            f"adapter {source} needs the package {error.name}, which is not installed",
            'Install it: pip install "kvscope[peft]"',
        ) from error


def load_base(source: str, base: str, load: Callable[[], T]) -> T:
    """Return what `load` returns; an error says that it concerns the base model of an adapter."""
    try:
        return load()
    except KvscopeError as error:
        raise ModelError(
            f"adapter {source} changes {base}, which cannot be loaded: {error.what}",
            f"{error.todo.rstrip('.')}, or correct base_model_name_or_path in its {ADAPTER}.",
        ) from error


def add_adapter(source: str, folder: Path, model: CausalModel, *, merge: bool) -> CausalModel:
    """Return the model with an adapter added: to its weights, or, where they are quantised, as modules beside them.

    Raises
    ------
    ModelError
        If the adapter does not fit the model, or lacks some of its weights.
    """
    peft = import_module("peft")
    with explained(source, "adapter"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # missing weights are refused below
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        wrapped = peft.PeftModel(model, config)
        missing = wrapped.load_adapter(str(folder), "default", is_trainable=False).missing_keys
        if missing:
            raise ModelError(f"adapter {source} lacks {len(missing)} of its weights, among them {min(missing)}", AGAIN)
        wrapped.eval()
        return wrapped.merge_and_unload(safe_merge=True) if merge else wrapped.get_base_model()
