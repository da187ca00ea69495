"""Quantised weights: checkpoints that contain them, and models that are quantised at loading (``--quantize``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import ModelConfig
from kvscope.model.explain import first_line, kind

CHOICES = ("4bit", "8bit")
AT_LOADING = "bitsandbytes {} at loading"


def at_loading(recorded: str | None) -> str | None:
    """Return the value of ``--quantize`` that a trace was recorded with; None if it was recorded without."""
    return next((choice for choice in CHOICES if recorded == AT_LOADING.format(choice)), None)


def require_quantize(quantize: str | None, device: torch.device, dtype: str | torch.dtype) -> None:
    """Raise an error unless a model can be quantised at loading, before anything is loaded."""
    if quantize is None:
        return
    if quantize not in CHOICES:
        raise UsageError(f"--quantize {quantize!r} is unknown", f"Use one of: {', '.join(CHOICES)}.")
    if dtype is torch.float64:
        raise UsageError(f"--quantize {quantize} does not compute in float64", "Use --dtype auto, float16 or bfloat16.")
    if device.type != "cuda":
        raise ModelError(f"--quantize {quantize} needs a CUDA device, and this is {device}", "Omit --quantize here.")
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantize {quantize} needs the package bitsandbytes, which is not installed",
            "Install it: pip install bitsandbytes accelerate",
        )


def stored_quantization(source: str, config: ModelConfig, quantize: str | None) -> str | None:
    """Return how the weights of a checkpoint are quantised, ``gptq 4bit``; None if they are not.

    Raises
    ------
    ModelError
        If transformers does not support the method: it would take the quantised numbers for the weights.
    UsageError
        If they are to be quantised once more.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    said = dict(given) if isinstance(given, dict) else given.to_dict()
    bits = f"{said['bits']}bit" if said.get("bits") else ""
    method = str(said.get("quant_method") or "")
    for choice in CHOICES:
        if said.get(f"load_in_{choice}"):
            method, bits = "bitsandbytes", choice
    if method != "bitsandbytes" and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"the weights of {kind(source)} {source} are quantised by {method or 'a method without a name'}, which "
            "transformers does not support",
            "Use a model without it, or one quantised by GPTQ, AWQ, FP8 or bitsandbytes.",
        )
    if quantize is not None:
        raise UsageError(f"--quantize {quantize}: {source} is quantised already, by {method}", "Omit --quantize.")
    return f"{method} {bits}".strip()


def quantize_arguments(quantize: str | None, device: torch.device) -> dict[str, object]:
    """Return the arguments with which transformers quantises a model at loading; the model is then on its device."""
    if quantize is None:
        return {}
    four = quantize == "4bit"
    chosen = {"load_in_4bit": four, "load_in_8bit": not four, "bnb_4bit_compute_dtype": torch.bfloat16}
    made = BitsAndBytesConfig(**chosen)  # type: ignore[no-untyped-call]
    return {"quantization_config": made, "device_map": {"": device}}


@contextmanager
def packages_explained(source: str, method: str | None) -> Iterator[None]:
    """Turn the error for a missing package of a quantisation method into one that says what to install."""
    try:
        yield
    except ImportError as error:
        if method is None:
            raise
        package = re.search(r"pip install (?:-U )?['\"]?([^'\"`\s)]+)", str(error))
        todo = f'Install it: pip install "{package[1].rstrip(".")}"' if package else first_line(error)
        name = re.split(r"[<>=\[]", package[1])[0] if package else "a package"
        raise ModelError(
            f"the weights of {kind(source)} {source} are quantised by {method}, which needs {name}: not installed", todo
        ) from error


def finished(model: torch.nn.Module, source: str, dtype: str | torch.dtype) -> torch.nn.Module:
    """Return the model in the dtype asked for: weights that were unpacked at loading may be in another.

    Raises
    ------
    ModelError
        If its weights stay quantised, and float64 is asked for.
    """
    if not isinstance(dtype, torch.dtype):
        return model
    if not getattr(model, "is_quantized", False):
        return model.to(dtype)
    if dtype is torch.float64:
        raise ModelError(f"the weights of {source} stay quantised, and do not compute in float64", "Use --dtype auto.")
    return model
