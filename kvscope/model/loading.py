"""Loading a model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_log

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import CausalModel, ModelConfig, Tokenizer
from kvscope.core.options import ModelSource
from kvscope.model.explain import HttpError, explained, fetch, first_line, kind
from kvscope.model.names import resolve

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate; any other is one device
REACH_SECONDS = 5  # how long the Hub may take to say whether it is there


@dataclass
class Loaded:
    """A model that is ready to run, its tokenizer, and what it was loaded from."""

    model: CausalModel
    tokenizer: Tokenizer
    name: str
    source: str
    revision: str | None

    @property
    def device(self) -> torch.device:
        """Where its input goes."""
        return torch.device(self.model.get_input_embeddings().weight.device)

    @property
    def text_config(self) -> ModelConfig:
        """The configuration of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """Longest sequence that the model was made for, if it says so."""
        return getattr(self.text_config, "max_position_embeddings", None)


def load(source: ModelSource) -> Loaded:
    """Return a model that is ready to run, and its tokenizer.

    Parameters
    ----------
    source : ModelSource
        A name to load, or a pair ``(model, tokenizer)`` that is loaded already: it is used as it is, where it is.

    Raises
    ------
    UsageError
        For an unknown name, dtype or device; for a loaded pair, if the model is in training mode or the source also
        says how to load it.
    ModelError
        Not found, gated, no network, no safetensors, out of memory, damaged: each says which, and what to do.
    """
    if isinstance(source.model, str):
        return _load_name(source.model, source)
    given = [name for name, value in asdict(replace(source, model="")).items() if value != _DEFAULTS[name]]
    if given:
        raise UsageError(
            f"a loaded model is given together with {', '.join(given)}", "Leave that out: it is for loading by name."
        )
    model, tokenizer = source.model
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode", "Call model.eval() first.")
    name = model_name(source)
    return Loaded(model, tokenizer, name, name, None)


_DEFAULTS = asdict(ModelSource(""))


def model_name(source: ModelSource) -> str:
    """Return the name of a model: as given, or for a loaded one its configuration's, or that of its class."""
    if isinstance(source.model, str):
        return source.model
    model, _ = source.model
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _load_name(name: str, how: ModelSource) -> Loaded:
    source = resolve(name)
    place, dtype = _device(how.device), _dtype(how)
    local = Path(source).is_dir()
    if local:
        _require_files(Path(source))
        if how.revision is not None:
            raise UsageError(f"--revision {how.revision}: folder {source} has no revisions", "Leave --revision out.")
    offline = not local and not _hub_answers(source, how.revision)
    common = {
        "revision": how.revision,
        "trust_remote_code": how.trust_remote_code,
        "local_files_only": local or offline,
    }
    transformers_log.disable_progress_bar()  # type: ignore[no-untyped-call]  # the command has its own
    with explained(source, "configuration", offline=offline):
        config = AutoConfig.from_pretrained(source, **common)
        _refuse_by_name(config)
    with explained(source, "tokenizer", offline=offline):
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        _require_vocabulary(source, tokenizer)
    with explained(source, "weights", offline=offline):
        model = _weights(source, dtype=dtype, device_map=how.device_map, **common)
        if how.device_map is None:
            model = model.to(place)
    model.eval()
    return Loaded(model, tokenizer, name, source, how.revision if local else _commit(source, how.revision))


def _dtype(how: ModelSource) -> str | torch.dtype:
    """Return the dtype that transformers loads; raises UsageError for an unknown dtype or device map."""
    if how.dtype not in DTYPES:
        raise UsageError(f"dtype {how.dtype!r} is unknown", f"Use one of: {', '.join(DTYPES)}.")
    if how.device_map is not None and how.device_map not in DEVICE_MAPS:
        _device(how.device_map)
    if how.dtype == "auto" and how.device_map is None and _device(how.device).type == "cpu":
        return torch.float32  # half precision on a CPU is slow, and float32 holds every 16-bit weight exactly
    return DTYPES[how.dtype]


def _commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a Hub model, which names the folder in the cache that it was loaded from."""
    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def _hub_answers(source: str, revision: str | None) -> bool:
    """Tell whether the Hub answers at all, after one question.

    transformers would ask for every file anew, and wait and ask again for half a minute when nobody answers.
    """
    with explained(source, "configuration"):
        address = hf_hub_url(source, "config.json", revision=revision)
    try:
        get_hf_file_metadata(address, timeout=REACH_SECONDS)
    except HfHubHTTPError:
        return True  # with a refusal, which loading meets again and explains
    except (HttpError, OfflineModeIsEnabled):
        return False
    return True


def _require_files(folder: Path) -> None:
    """Raise ModelError unless a local folder has a configuration, and weights in whole safetensors files."""
    todo = f"Name the folder of a model, or fetch one into it: {fetch(str(folder))}"
    if not (folder / "config.json").is_file():
        raise ModelError(f"folder {folder} has no config.json, so it is no model", todo)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"folder {folder} has no safetensors weights, only {pickled[0]}",
                "Convert them: pickled weights can run code and are not loaded.",
            )
        raise ModelError(f"folder {folder} has no safetensors weights", todo)
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged or cut short: {first_line(error)}", "Download it again.") from error


def _require_vocabulary(source: str, tokenizer: Tokenizer) -> None:
    """Raise ModelError for a tokenizer of nothing, which transformers makes for some models without its files."""
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ModelError(
            f"the tokenizer of {kind(source)} {source} has no vocabulary", f"Fetch all of the model: {fetch(source)}"
        )


def _weights(source: str, **options: object) -> CausalModel:
    """Return the model; transformers would fill weights that are not there with random ones, and only log it."""
    log = logging.getLogger("transformers.modeling_utils")
    before, log.disabled = log.disabled, True  # its table of every such weight
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    finally:
        log.disabled = before
    model, info = loaded
    missing = set(info["missing_keys"]).intersection(name for name, _ in model.named_parameters())
    for names, what in (({name for name, *_ in info["mismatched_keys"]}, "of another shape"), (missing, "missing")):
        if names:
            raise ModelError(
                f"{len(names)} of the weights of {kind(source)} {source} are {what}: {min(names)} is one",
                "Download it again, or name the model that its weights were saved from.",
            )
    return model


def _refuse_by_name(config: ModelConfig) -> None:
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
        raise UsageError(f"device {name!r} cannot be used: {first_line(error)}", "Use --device cpu.") from error
    return device
