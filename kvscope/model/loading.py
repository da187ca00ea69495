"""Load a model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_log

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import CausalModel, ModelConfig, Processor, Tokenizer
from kvscope.core.options import ModelSource
from kvscope.kernels.device import torch_device
from kvscope.model.adapter import adapter_of, add_adapter, base_of, load_base, require_peft
from kvscope.model.explain import HttpError, explained, fetch, kind
from kvscope.model.generation_notes import generation_notes
from kvscope.model.gguf_file import as_numbers, gguf_of, place_of, quantization_of, without_bars
from kvscope.model.kept import kept
from kvscope.model.names import resolve
from kvscope.model.obstacles import OWN_CODE, obstacle, require_type
from kvscope.model.quantised import (
    AT_LOADING,
    finished,
    packages_explained,
    quantize_arguments,
    require_quantize,
    stored_quantization,
)
from kvscope.model.read_weights import loader_of, read_model
from kvscope.model.weight_files import require_files
from kvscope.model.weights_progress import weights_followed

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEVICE_MAPS = (
    "auto",
    "balanced",
    "balanced_low_0",
    "sequential",
)  # of accelerate; any other value is one device
REACH_SECONDS = 5  # timeout of the request that checks whether the Hub can be reached


@dataclass
class Loaded:
    """A model that is ready to run, its tokenizer, and its source.

    Attributes
    ----------
    model, tokenizer
        As transformers loads them; the model in eval mode.
    name : str
        As the user named it.
    source : str
        Local folder or Hub id that the name stands for.
    revision : str or None
        Commit of a Hub model.
    quantization : str or None
        How its weights were quantised, ``gguf Q8_0``; None if they were not.
    base : str or None
        Of an adapter: the model that it changes.
    notes : tuple of str
        What the user should know about how it was loaded.
    processor : ProcessorMixin or None
        Of a multimodal model whose prompts have images; loaded by `kvscope.model.processors` when the first is read.
    """

    model: CausalModel
    tokenizer: Tokenizer
    name: str
    source: str
    revision: str | None
    quantization: str | None = None
    base: str | None = None
    notes: tuple[str, ...] = ()
    processor: Processor | None = None

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, on which inputs must be."""
        return torch.device(self.model.get_input_embeddings().weight.device)

    @property
    def text_config(self) -> ModelConfig:
        """The configuration of the language model; of a multimodal model, that of its text part."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def context(self) -> int | None:
        """Longest sequence that the model supports, in tokens; None if its configuration does not say."""
        most = getattr(self.text_config, "max_position_embeddings", None)
        return most if most is not None and most > 0 else None  # some types write -1 for no limit


def load(source: ModelSource) -> Loaded:
    """Return a model that is ready to run, and its tokenizer.

    Parameters
    ----------
    source : ModelSource
        A name to load, or a loaded pair ``(model, tokenizer)``, which is used as it is, on its device.

    Raises
    ------
    UsageError
        For an unknown name, dtype or device; for a loaded pair, if the model is in training mode or the source has
        options for loading.
    ModelError
        If the model is not found, gated, not in safetensors, damaged or too large, or the Hub cannot be reached.
    """
    if isinstance(source.model, str):
        name = source.model
        return kept(source, lambda: _load_name(name, source))
    given = [name for name, value in asdict(replace(source, model="")).items() if value != _DEFAULTS[name]]
    if given:
        raise UsageError(
            f"a loaded model is given together with {', '.join(given)}",
            "Omit these options: they apply to names only.",
        )
    model, tokenizer = source.model
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode", "Call model.eval() first.")
    require_type(model.config)
    name = model_name(source)
    return Loaded(model, tokenizer, name, name, None)


_DEFAULTS = asdict(ModelSource(""))


def model_name(source: ModelSource) -> str:
    """Return the name of a model as given; for a loaded pair, its configuration's ``name_or_path`` or its class."""
    if isinstance(source.model, str):
        return source.model
    model, _ = source.model
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _load_name(name: str, how: ModelSource) -> Loaded:
    source = resolve(name)
    offline = not Path(source).exists() and not hub_answers(source, how.revision)
    adapter = adapter_of(source, how.revision, offline=offline)
    if adapter is None:
        return _load_model(name, source, how, offline=offline)
    require_peft(source)
    base, revision = base_of(adapter)
    _refuse_revision(source, how)
    loaded = load_base(source, base, lambda: _load_base(base, replace(how, revision=revision)))
    model = add_adapter(source, adapter, loaded.model, merge=_has_numbers(loaded))
    own = adapter if (adapter / "tokenizer_config.json").is_file() else None
    if own is not None:
        with explained(source, "tokenizer"):
            loaded.tokenizer = AutoTokenizer.from_pretrained(own, local_files_only=True)
    commit = None if Path(source).exists() else adapter.name
    return replace(loaded, model=model.eval(), name=name, source=source, revision=commit, base=base)


def _has_numbers(loaded: Loaded) -> bool:
    """Return whether weights are plain numbers in memory; those of GGUF files are."""
    return loaded.quantization is None or loaded.quantization.startswith("gguf")


def _load_base(base: str, how: ModelSource) -> Loaded:
    """Return the model that an adapter changes; raises ModelError if that is an adapter too."""
    source = resolve(base)
    offline = not Path(source).exists() and not hub_answers(source, how.revision)
    if adapter_of(source, how.revision, offline=offline) is not None:
        raise ModelError("it is an adapter itself", "Merge the two with PEFT")
    return _load_model(base, source, how, offline=offline)


def _refuse_revision(source: str, how: ModelSource) -> None:
    if Path(source).exists() and how.revision is not None:
        raise UsageError(f"--revision {how.revision}: {kind(source)} {source} has no revisions", "Omit --revision.")


def _load_model(name: str, source: str, how: ModelSource, *, offline: bool) -> Loaded:
    device, dtype = torch_device(how.device, double=False), _dtype(how)
    local, gguf = Path(source).exists(), gguf_of(source)
    place, named = place_of(source)
    require_quantize(how.quantize, device, dtype)
    quantization = None if gguf is None else quantization_of(gguf)
    safe = require_files(Path(source)) if local and gguf is None else True
    _refuse_revision(source, how)
    common = {
        "revision": how.revision,
        "trust_remote_code": how.trust_remote_code,
        "local_files_only": local or offline,
        **named,
    }
    transformers_log.disable_progress_bar()  # type: ignore[no-untyped-call]  # the command line draws its own
    with explained(source, "configuration", offline=offline):
        config = AutoConfig.from_pretrained(place, **common)
        require_type(config)
        quantization = quantization or stored_quantization(source, config, how.quantize)
    with explained(source, "tokenizer", offline=offline):
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
        require_vocabulary(source, tokenizer)
    with explained(source, "weights", offline=offline):
        # The grouped products of experts do not take float64; the plain loop over the experts takes every dtype.
        experts = {"experts_implementation": "eager"} if dtype is torch.float64 else {}
        own = {"attn_implementation": "eager"} if config.model_type in OWN_CODE else {}
        numbers = as_numbers() if gguf is not None else {}
        options = {"dtype": dtype, "device_map": how.device_map, **experts, **own, **numbers, **common}
        options |= quantize_arguments(how.quantize, device)
        with weights_followed(), without_bars(gguf), packages_explained(source, quantization):
            model = read_model(place, loader_of(config), safe, options)
        if not own and obstacle(model):
            model.set_attn_implementation("eager")  # whose modules return rows
        if quantization is not None:
            model = finished(model, source, dtype)
        if how.device_map is None and how.quantize is None:
            model = model.to(device)
    model.eval()
    revision = how.revision if local else _commit(source, how.revision)
    quantization = quantization if how.quantize is None else AT_LOADING.format(how.quantize)
    return Loaded(model, tokenizer, name, source, revision, quantization, notes=generation_notes(model))


def _dtype(how: ModelSource) -> str | torch.dtype:
    """Return the dtype to pass to transformers; raises UsageError for an unknown dtype or device map."""
    if how.dtype not in DTYPES:
        raise UsageError(f"dtype {how.dtype!r} is unknown", f"Use one of: {', '.join(DTYPES)}.")
    if how.device_map is not None and how.device_map not in DEVICE_MAPS:
        torch_device(how.device_map, double=False)
    if how.dtype == "auto" and how.device_map is None and torch_device(how.device, double=False).type == "cpu":
        return torch.float32  # half precision on a CPU is slow, and float32 holds every 16-bit weight exactly
    return DTYPES[how.dtype]


def _commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a cached Hub model, which is the name of its folder in the cache."""
    file = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision


def hub_answers(source: str, revision: str | None) -> bool:
    """Return whether the Hub can be reached, after one request.

    Without this check transformers would request every file, and retry each for half a minute.
    """
    with explained(source, "configuration"):
        address = hf_hub_url(source, "config.json", revision=revision)
    try:
        get_hf_file_metadata(address, timeout=REACH_SECONDS)
    except HfHubHTTPError:
        return True  # it answered with an error, which loading will meet again and explain
    except (HttpError, OfflineModeIsEnabled):
        return False
    return True


def require_vocabulary(source: str, tokenizer: Tokenizer) -> None:
    """Raise ModelError for an empty tokenizer, which transformers makes for some models whose files are missing."""
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ModelError(
            f"the tokenizer of {kind(source)} {source} has no vocabulary", f"Download the whole model: {fetch(source)}"
        )
