"""Prompts with images: token ids, what the model reads of the images, and which tokens stand for which image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.text_spans import TokenSpan
from kvscope.model.image_files import ImageFile, ReadAddress, read_image
from kvscope.model.loading import Loaded
from kvscope.model.processors import image_token_of, processed, processor_of
from kvscope.model.prompt_files import PromptText
from kvscope.model.token_ids import TextEncoder

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")  # inputs with a number for each token, 0 for text


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt.

    Attributes
    ----------
    file : ImageFile
        The image, without its picture, which is no longer needed.
    start, stop : int
        Its tokens in the prompt, from the first to the one after the last, those that end its lines included.
    tokens : int
        How many of them stand for a part of the image.
    """

    file: ImageFile
    start: int
    stop: int
    tokens: int


@dataclass(frozen=True)
class ImageInputs:
    """What a model reads beside the ids of one prompt.

    Attributes
    ----------
    tensors : mapping of str to Tensor
        Arguments of the model's forward pass: ``pixel_values`` and others, on the host until they are needed.
    images : tuple of PromptImage
        The images, in order.
    token : int
        Id of the tokens that stand for images.
    device : torch.device
        Device of the model's inputs.
    """

    tensors: Mapping[str, Tensor]
    images: tuple[PromptImage, ...]
    token: int
    device: torch.device

    def for_tokens(self, count: int) -> dict[str, Tensor]:
        """Return the tensors for the prompt and the text that follows it, `count` tokens altogether, on the device."""
        sized = {name: _longer(each, count) if name in PER_TOKEN else each for name, each in self.tensors.items()}
        return {name: tensor.to(self.device) for name, tensor in sized.items()}

    @property
    def spans(self) -> tuple[TokenSpan, ...]:
        """The tokens of each image: ``image 1``, ``image 2``, ..."""
        return tuple(TokenSpan(f"image {n}", image.start, image.stop) for n, image in enumerate(self.images, 1))


def read_images(prompt: PromptText, read_address: ReadAddress | None) -> tuple[ImageFile, ...]:
    """Return the images of a prompt; errors as of `read_image`."""
    return tuple(read_image(name, prompt.place, read_address) for name in prompt.images)


def encode_with_images(
    loaded: Loaded, prompt: PromptText, text: str, files: Sequence[ImageFile], encoder: TextEncoder, *, chat: bool
) -> tuple[list[int], list[int] | None, ImageInputs]:
    """Return the ids of a prompt and of its forced continuation, and what the model reads of its images.

    Parameters
    ----------
    text : str
        The prompt with a placeholder for each image, as the chat template rendered it.
    chat : bool
        Whether a template rendered it: it has then written what begins a text.

    Raises
    ------
    UsageError
        If the text has more or fewer placeholders than there are images.
    ModelError
        If the processor fails, or gives what the model does not read.
    """
    _require_places(loaded, prompt.place, text, len(files))
    pictures = [file.picture for file in files]
    made = processed(loaded, prompt.place, text, pictures)
    ids = _ids(made)
    forced: list[int] | None = None
    if prompt.continuation is not None:
        whole = _ids(processed(loaded, prompt.place, text + prompt.continuation, pictures))
        same = next((n for n, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
        ids, forced = whole[:same], whole[same:]
        if not forced:
            raise UsageError(f"the continuation of prompt {prompt.place} has no tokens", "Write some text into it.")
    before = [] if chat or encoder.writes_prefix(ids) else encoder.prefix
    tensors = _tensors(loaded, made, len(before), len(before) + len(ids))
    ids = [*before, *ids]
    token = image_token_of(loaded)
    assert token is not None, "the model has a processor for images"
    return ids, forced, ImageInputs(tensors, _places(loaded, prompt.place, ids, token, files), token, loaded.device)


def _ids(made: Mapping[str, object]) -> list[int]:
    ids = made["input_ids"]
    assert isinstance(ids, Tensor), "the processor was asked for tensors"
    return [int(number) for number in ids[0].tolist()]


def _require_places(loaded: Loaded, place: str, text: str, count: int) -> None:
    """Raise UsageError unless a text has a placeholder for each image."""
    known = _placeholders(loaded, place)
    found = [token for token in known if token in text]
    token = (found or known)[0]
    places = text.count(token)
    if places != count:
        what = f"{count} image{'s' if count > 1 else ''} and {places or 'no'} place{'s' if places > 1 else ''} for"
        raise UsageError(
            f"prompt {place} has {what} images in its text",
            f"Add --chat for one before the text, or write {token} where each belongs, as the chat template does.",
        )


def _placeholders(loaded: Loaded, place: str) -> list[str]:
    """Return the tokens that may stand for an image in a text, as its processor has them."""
    processor = processor_of(loaded, place)
    given = [getattr(processor, name, None) for name in ("boi_token", "image_token")]
    return [str(getattr(token, "content", token)) for token in given if token] or ["<image>"]


def inputs_again(loaded: Loaded, place: str, ids: Sequence[int], files: Sequence[ImageFile]) -> ImageInputs:
    """Return what a model reads of the images of a prompt whose `ids` are known.

    Raises
    ------
    ModelError
        If the processor fails, or makes another number of tokens of the images.
    """
    text = " ".join([_placeholders(loaded, place)[0]] * len(files))
    made = processed(loaded, place, text, [file.picture for file in files])
    token = image_token_of(loaded)
    assert token is not None, "the model has a processor for images"
    now, then = _ids(made).count(token), list(ids).count(token)
    if now != then:
        raise ModelError(
            f"the processor of {loaded.name} makes {now} tokens of the images of prompt {place}, and {then} were "
            "recorded",
            "Give the model that was traced, with its processor as it was.",
        )
    for name in PER_TOKEN:
        if name in made:
            made[name] = torch.tensor([[int(each == token) for each in ids]])
    return ImageInputs(
        _tensors(loaded, made, 0, len(ids)), _places(loaded, place, ids, token, files), token, loaded.device
    )


def _tensors(loaded: Loaded, made: Mapping[str, object], before: int, count: int) -> dict[str, Tensor]:
    """Return the arguments for the model's forward pass, for `count` tokens of which the first `before` were added."""
    takes, model = inspect.signature(loaded.model.forward).parameters, loaded.model
    found = {}
    for name, value in made.items():
        if name in ("input_ids", "attention_mask"):
            continue
        if name not in takes or not isinstance(value, Tensor):
            raise ModelError(
                f"the processor of {loaded.name} gives {name}, which {type(model).__name__} does not read",
                "Check that the files of its folder belong together.",
            )
        if name in PER_TOKEN:
            value = _longer(torch.nn.functional.pad(value, (before, 0)), count)
        found[name] = value.to(model.dtype) if value.is_floating_point() else value
    return found


def _longer(numbers: Tensor, count: int) -> Tensor:
    """Return ``[1, n]`` as ``[1, count]``: cut, or with zeros at the end."""
    return torch.nn.functional.pad(numbers[:, :count], (0, max(0, count - numbers.shape[1])))


def _places(
    loaded: Loaded, place: str, ids: Sequence[int], token: int, files: Sequence[ImageFile]
) -> tuple[PromptImage, ...]:
    """Return the tokens of each image: of all that stand for images, in order, as many as each alone has.

    Raises
    ------
    ModelError
        If the images together do not have as many tokens as each alone.
    """
    at = [number for number, each in enumerate(ids) if each == token]
    counts = [len(at)]
    if len(files) > 1:
        alone = _placeholders(loaded, place)[0]
        counts = [_ids(processed(loaded, place, alone, [file.picture])).count(token) for file in files]
    if not all(counts) or sum(counts) != len(at):
        raise ModelError(
            f"prompt {place} has {len(at)} tokens of images, and its images alone have {', '.join(map(str, counts))}",
            "Record a prompt for each image.",
        )
    ends = list(accumulate(counts))
    return tuple(
        PromptImage(replace(file, picture=None), at[end - count], at[end - 1] + 1, count)
        for file, count, end in zip(files, counts, ends, strict=True)
    )
