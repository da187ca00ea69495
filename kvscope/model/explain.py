"""Turn errors of transformers, the Hub and safetensors into two lines: what is wrong with a model, and what to do."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kvscope.core.errors import KvscopeError, ModelError
from kvscope.core.memory import is_out_of_memory

# Base class of the HTTP client's errors; the client is httpx in huggingface_hub 1, and httpx2 in 2.
HttpError: type[Exception] = HfHubHTTPError.__bases__[0]


@contextmanager
def explained(source: str, part: str, *, offline: bool = False) -> Iterator[None]:
    """Turn errors raised while a part of a model is loaded into a `ModelError` that says what to do.

    Parameters
    ----------
    source : str
        Folder or Hub id.
    part : str
        ``configuration``, ``tokenizer`` or ``weights``.
    offline : bool
        Whether the source is a Hub id and only files in the local cache can be read.
    """
    try:
        yield
    except (KvscopeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except GatedRepoError as error:
        raise _gated(source) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {source} has no such revision", "Check --revision.") from error
    except LocalEntryNotFoundError as error:
        raise _not_here(source, part) from error
    except RepositoryNotFoundError as error:
        raise _unknown(source) from error
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(source) from error
    except ImportError as error:
        raise _without_package(source, error) from error
    except OSError as error:
        raise _not_here(source, part) if offline else _explain_text(source, part, error) from error
    except BaseException as error:  # tokenizers raises bare exceptions, and panics that are no exceptions
        raise _explain_text(source, part, error) from error


@contextmanager
def memory_explained(name: str) -> Iterator[None]:
    """Turn an out-of-memory error raised while the model called `name` runs into a `ModelError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(name) from error


def out_of_memory(name: str) -> ModelError:
    """Return the error for a model that does not fit in memory."""
    gc.collect()
    return ModelError(
        f"out of memory with {name}",
        "Try --dtype bfloat16, --device-map auto, fewer --layers, a smaller --query-block, or a shorter prompt.",
    )


def _without_package(source: str, error: ImportError) -> ModelError:
    """Return the error for a package that a model needs, by the name that transformers says, if it says one."""
    name = re.search(r"requires? the (\S+) library", str(error))
    if name is None:
        return ModelError(
            f"model {source} needs a package that is missing: {first_line(error)}", "Install it, then try again."
        )
    command = re.search(r"pip install [^`\n]+", str(error))
    return ModelError(
        f"model {source} needs {name[1]}, which is not installed",
        f"Install it: {command[0]}" if command else "Install it, then try again.",
    )


def _explain_text(source: str, part: str, error: BaseException) -> ModelError:
    low = str(error).lower()
    if isinstance(error, OSError) and lacks_safetensors(error):
        return ModelError(
            f"model {source} has its weights neither in safetensors nor in pytorch_model.bin",
            "Name a model that has them in one of these, or a .gguf file.",
        )
    unreachable = isinstance(error, HttpError) and not isinstance(error, HfHubHTTPError)
    if unreachable or "couldn't connect" in low or "connection error" in low:
        return _not_here(source, part)
    if "out of memory" in low or "can't allocate memory" in low:
        return out_of_memory(source)
    if "trust_remote_code" in low:
        return ModelError(f"{kind(source)} {source} contains Python code", "If you trust it, add --trust-remote-code.")
    if "gated repo" in low:
        return _gated(source)
    if "is not a local folder and is not a valid model identifier" in low:
        return _unknown(source)
    return ModelError(
        f"the {part} of {kind(source)} {source} cannot be loaded: {first_line(error)}",
        f"Check that it is a causal language model, or download it again: {fetch(source)}",
    )


def _not_here(source: str, part: str) -> ModelError:
    what = f"model {source}" if part == "configuration" else f"the {part} of model {source}"
    why, first = "the Hub cannot be reached", f"Download it where there is a network ({fetch(source)})"
    if is_offline_mode():
        why, first = "HF_HUB_OFFLINE forbids access to the Hub", "Unset HF_HUB_OFFLINE"
    return ModelError(
        f"{what} {'is' if part != 'weights' else 'are'} not on this machine, and {why}",
        f"{first}, set HF_HOME to a cache that contains it, or name a local folder.",
    )


def _gated(source: str) -> ModelError:
    return ModelError(
        f"model {source} is gated", f"Accept its terms at huggingface.co/{source}, then run: hf auth login"
    )


def _unknown(source: str) -> ModelError:
    return ModelError(
        f"no model {source} on the Hub, or it is private", "Check the name; for a private model run: hf auth login"
    )


def lacks_safetensors(error: OSError) -> bool:
    """Return whether transformers says that a model of the Hub has no weights in safetensors."""
    low = str(error).lower()
    return "safetensors" in low and any(said in low for said in ("does not appear to have", "no file named"))


def kind(source: str) -> str:
    """Return the word for a source: ``folder``, ``file`` or ``model``."""
    if Path(source).is_file():
        return "file"
    return "folder" if Path(source).is_dir() else "model"


def fetch(source: str) -> str:
    """Return the command that downloads a model, into `source` if that is a folder, or the file `source`."""
    if Path(source).is_file():
        return f"hf download ORG/NAME {Path(source).name} --local-dir {Path(source).parent}"
    return f"hf download ORG/NAME --local-dir {source}" if Path(source).is_dir() else f"hf download {source}"


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or the name of an error that has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
