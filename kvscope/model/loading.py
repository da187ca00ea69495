"""Loading a model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvscope.errors import ModelError, UsageError
from kvscope.model.names import resolve

DTYPES = {"auto": "auto", "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Loaded:
    """A model that is ready to run, its tokenizer, and what it was loaded from."""

    model: Any
    tokenizer: Any
    name: str
    source: str
    revision: str | None

    @property
    def device(self) -> torch.device:
        """Where its input goes."""
        return torch.device(self.model.get_input_embeddings().weight.device)

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """Longest sequence that the model was made for, if it says so."""
        return getattr(self.text_config, "max_position_embeddings", None)


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Return a model and its tokenizer.

    Parameters
    ----------
    name : str
        ``demo``, an alias, a Hub id, or a local folder.
    revision : str, optional
        Branch, tag or commit of a Hub model.
    dtype : str
        ``auto`` (that of the weights; 16-bit weights become float32 on a CPU), ``float32``, ``float16``, ``bfloat16``.
    device, device_map : str
        Where it runs; with a map, accelerate places its parts.
    trust_remote_code : bool
        Whether code that comes with the model may run.

    Raises
    ------
    UsageError
        For an unknown name, dtype or device.
    ModelError
        Not found, gated, no network, no safetensors, out of memory, damaged: each says which, and what to do.
    """
    source = resolve(name)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown", f"Use one of: {', '.join(DTYPES)}.")
    place = _device(device)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with explained(name, source):
        config = AutoConfig.from_pretrained(source, **common)
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        wanted: Any = DTYPES[dtype]
        if dtype == "auto" and place.type == "cpu" and device_map is None:
            wanted = torch.float32  # half precision on a CPU is slow, and float32 holds every 16-bit weight exactly
        _refuse_by_name(config)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, device_map=device_map, **common
        )
        if device_map is None:
            model = model.to(place)
    model.eval()
    return Loaded(model, tokenizer, name, source, getattr(config, "_commit_hash", None) or revision)


@contextmanager
def explained(name: str, source: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise into a `ModelError` with what to do."""
    transformers_log: Any = logging
    transformers_log.disable_progress_bar()  # the command has its own
    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"model {source} is gated", f"Accept its terms at huggingface.co/{source}, then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {source} has no such revision", "Check --revision.") from error
    except LocalEntryNotFoundError as error:
        raise _no_network(source) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no model {source} on the Hub, or it is private", "Check the name; for a private model run: hf auth login"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory(name) from error
    except MemoryError as error:
        raise out_of_memory(name) from error
    except ImportError as error:
        raise ModelError(
            f"model {source} needs a package that is missing: {_first_line(error)}", "Install it, then try again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _explain_text(source, error) from error


def out_of_memory(name: str) -> ModelError:
    """Return the error for a model that does not fit."""
    gc.collect()
    return ModelError(
        f"out of memory with {name}",
        "Try --dtype bfloat16, --device-map auto, fewer --layers, a smaller --query-block, or a shorter prompt.",
    )


_UNREACHABLE = ("offline", "couldn't connect", "connection error", "name resolution", "max retries")


def _explain_text(source: str, error: Exception) -> ModelError:
    text = str(error)
    low = text.lower()
    if "safetensors" in low and ("does not appear to have" in low or "no file named" in low or "not found" in low):
        return ModelError(
            f"model {source} has no safetensors weights", "Convert it: pickled weights can run code and are not loaded."
        )
    if any(
        part in low for part in ("offline", "couldn't connect", "connection error", "name resolution", "max retries")
    ):
        return _no_network(source)
    if "out of memory" in low or "can't allocate memory" in low:
        return out_of_memory(source)
    if "gated repo" in low:
        return ModelError(
            f"model {source} is gated", f"Accept its terms at huggingface.co/{source}, then: hf auth login"
        )
    if "is not a local folder and is not a valid model identifier" in low:
        return ModelError(f"no model {source} on the Hub, or it is private", "Check the name, or run: hf auth login")
    where = "folder" if Path(source).is_dir() else "model"
    return ModelError(
        f"{where} {source} cannot be loaded: {_first_line(error)}", "Check that it holds a causal language model."
    )


def _no_network(source: str) -> ModelError:
    return ModelError(
        f"model {source} is not on this machine, and the Hub cannot be reached",
        "Go online (unset HF_HUB_OFFLINE), set HF_HOME to a cache that has it, or name a local folder.",
    )


def _refuse_by_name(config: Any) -> None:
    if config.model_type in UNSUPPORTED:
        raise ModelError(
            f"models of type {config.model_type} do not use transformers' attention registry and cannot be watched",
            "Trace a model that does: Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, OPT, GPT-NeoX, ...",
        )


# Causal models of transformers 5 whose attention is their own code, or is none.
UNSUPPORTED = frozenset(
    "bloom codegen cpmant falcon falcon_mamba fuyu gpt_neo gpt_neox_japanese gptj mamba mamba2 megatron-bert mpt mvp "
    "prophetnet rembert roformer rwkv xglm xlstm big_bird trocr".split()
)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {_first_line(error)}", "Use --device cpu.") from error
    return device


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
