"""Short names of popular models."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.registry import nearest

DEMO = "demo"
ALIASES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma2-2b": "google/gemma-2-2b",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma3-1b": "google/gemma-3-1b-pt",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "gpt2": "openai-community/gpt2",
    "opt-125m": "facebook/opt-125m",
    "opt-6.7b": "facebook/opt-6.7b",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}


def demo_folder() -> Path:
    """Return the folder of the bundled model and its prompt.

    Raises
    ------
    ModelError
        If the installation does not contain it.
    """
    folder = Path(str(files("kvscope.model") / "demo"))
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"the bundled model is missing from {folder}", "Install kvscope again.")
    return folder


def resolve(name: str) -> str:
    """Return what a name stands for, a folder, GGUF file or Hub id: ``demo``, an alias, or one of these itself.

    Raises
    ------
    UsageError
        If it is none of these; the message suggests the nearest alias.
    ModelError
        If it is ``demo``, and the installation does not contain that model.
    """
    if name == DEMO:
        return str(demo_folder())
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if name and Path(name).is_dir():
        return name
    if Path(name).is_file() and name.endswith(".gguf"):
        return name
    if Path(name).is_file():
        raise UsageError(
            f"model {name} is a file", "Name the folder of the model, which contains config.json, or a .gguf file."
        )
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return name
    raise UsageError(
        f"no model is called {name!r}, and no folder has that name", nearest(name.lower(), [DEMO, *ALIASES])
    )
