"""The processor of a multimodal model: it turns a text and images into token ids and what the model reads of images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import transformers
from transformers import AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.utils.import_utils import is_torchvision_available

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import Processor
from kvscope.model.explain import explained, fetch, first_line
from kvscope.model.gguf_file import gguf_of
from kvscope.model.image_files import pillow
from kvscope.model.loading import Loaded
from kvscope.model.obstacles import obstacle

TEXT_ALONE = "Trace a multimodal model, such as Qwen2.5-VL or Llava, or omit the images."


def processor_of(loaded: Loaded, place: str) -> Processor:
    """Return the processor of a model, for the images of the prompt `place`.

    Raises
    ------
    UsageError
        If the model reads text alone, or Pillow is not installed.
    ModelError
        If its rows are those that modules return; if its processor is missing or needs another package.
    """
    if image_token_of(loaded) is None:
        raise UsageError(f"prompt {place} has images, and {loaded.name} ({_kind(loaded)}) reads text alone", TEXT_ALONE)
    why = obstacle(loaded.model)
    if why:
        raise ModelError(
            f"{why}, so its attention on the images of prompt {place} cannot be recorded",
            "Omit the images, or trace another multimodal model.",
        )
    if gguf_of(loaded.source) is not None:
        raise ModelError(
            f"{loaded.source} holds a language model without the part that reads images",
            "Trace the model in safetensors, or omit the images.",
        )
    if loaded.source == type(loaded.model).__name__:
        raise ModelError(
            f"a loaded {loaded.source} without a name has no processor, which the images of prompt {place} need",
            "Name the model or its folder instead of passing it loaded.",
        )
    pillow(place)
    if loaded.processor is None:
        loaded.processor = _load(loaded)
    if getattr(loaded.processor, "image_processor", None) is None:
        raise _without_processor(loaded)
    return loaded.processor


def _without_processor(loaded: Loaded) -> ModelError:
    return ModelError(
        f"model {loaded.name} has no image processor: preprocessor_config.json and processor_config.json are missing",
        f"Download the whole model ({fetch(loaded.source)}), or omit the images.",
    )


def image_token_of(loaded: Loaded) -> int | None:
    """Return the token that stands for a part of an image; None for a model that reads text alone."""
    config = loaded.model.config
    if config.get_text_config(decoder=True) is config and getattr(config, "vision_config", None) is None:
        return None
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None


def _kind(loaded: Loaded) -> str:
    return str(loaded.model.config.model_type)


def _load(loaded: Loaded) -> Processor:
    source = loaded.base or loaded.source  # an adapter's folder has no processor
    local, own_code = Path(source).exists(), type(loaded.model).__module__.startswith("transformers_modules.")
    revision = None if local or loaded.base else loaded.revision
    common = {"revision": revision, "local_files_only": local, "trust_remote_code": own_code}  # trusted at loading
    name = PROCESSOR_MAPPING_NAMES.get(_kind(loaded))
    with explained(loaded.name, "processor"), _lacks_explained(loaded):
        known = getattr(transformers, name, None) if name else None
        if known is not None and not is_torchvision_available():
            return without_videos(cast("type[Processor]", known)).from_pretrained(source, **common)
        return AutoProcessor.from_pretrained(source, **common)  # type: ignore[no-untyped-call]


@contextmanager
def _lacks_explained(loaded: Loaded) -> Iterator[None]:
    """Turn the errors for a missing package, and for a folder without a processor, into ones that say what to do."""
    try:
        yield
    except ImportError as error:
        package = re.search(r"requires? the (\w+) library", str(error))
        name = package[1].lower() if package else "a package"
        raise ModelError(
            f"the processor of {loaded.name} needs {name}, which is not installed",
            f"Install it: pip install {name}" if package else first_line(error),
        ) from error
    except OSError as error:
        if not Path(loaded.source).exists() or "preprocessor_config.json" not in str(error):
            raise
        raise _without_processor(loaded) from error


def without_videos(known: type[Processor]) -> type[Processor]:
    """Return a class of processors without its part for videos, which needs torchvision although no video is read."""
    if "video_processor" not in known.get_attributes():
        return known

    class WithoutVideos(known):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    WithoutVideos.__name__ = known.__name__
    return WithoutVideos


def processed(loaded: Loaded, place: str, text: str, pictures: list[object]) -> dict[str, object]:
    """Return what a processor makes of a text and its images: ``input_ids`` ``[1, P]`` and the model's other inputs.

    Raises
    ------
    ModelError
        If the processor fails.
    """
    processor = processor_of(loaded, place)
    try:
        made = processor(text=[text], images=pictures, return_tensors="pt", text_kwargs={"add_special_tokens": False})
    except Exception as error:  # processors raise errors of many kinds
        raise ModelError(
            f"the processor of {loaded.name} fails on prompt {place}: {first_line(error)}",
            "Check the images of the prompt and their places in its text.",
        ) from error
    return dict(made)
