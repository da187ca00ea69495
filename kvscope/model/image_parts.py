"""The images that a prompt names: in a list beside its text, or as parts of its messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvscope.core.errors import UsageError
from kvscope.core.json import Json, JsonDict
from kvscope.model.image_files import is_address

EXAMPLE = 'Write "images": ["picture.png", ...], or parts such as {"type": "image", "path": "picture.png"}.'
ADDRESSES = ("path", "url", "image", "image_url")  # fields of a part that name its image
TYPES = ("image", "image_url")
Message = dict[str, Json]


def images_beside(place: str, entry: JsonDict, folder: Path | None) -> tuple[str, ...]:
    """Return the paths and addresses in the list ``images`` of an object; paths are relative to `folder`.

    Raises
    ------
    UsageError
        If it is not a list of texts.
    """
    given = entry.get("images")
    if given is None:
        return ()
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise UsageError(f"{place}: images is not a list", EXAMPLE)
    return tuple(_address(place, each, folder) for each in given)


def images_within(
    place: str, messages: Sequence[Message], beside: tuple[str, ...], folder: Path | None
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return a conversation whose image parts are ``{"type": "image"}``, and their images in order.

    A part that names no image stands for the next one of the list `beside`.

    Raises
    ------
    UsageError
        If a part names no image and the list has none left, or the list has more than the conversation has parts.
    """
    found: list[str] = []
    left = list(beside)
    changed: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [_part(place, part, found, left, folder) for part in content]
            message = {**message, "content": parts}
        changed.append(message)
    if left:
        raise UsageError(
            f"prompt {place} names {len(left)} more image(s) than its messages have places for",
            'Put {"type": "image"} into the content of a message where each image belongs.',
        )
    return tuple(changed), tuple(found)


def _part(place: str, part: Json, found: list[str], left: list[str], folder: Path | None) -> Json:
    """Return a part of a message without the name of its image, which goes into `found`."""
    if not isinstance(part, dict) or part.get("type") not in TYPES:
        return part
    named = next((part[name] for name in ADDRESSES if part.get(name) is not None), None)
    if isinstance(named, dict):  # {"image_url": {"url": ...}}
        named = named.get("url")
    if named is not None:
        found.append(_address(place, named, folder))
    elif left:
        found.append(left.pop(0))
    else:
        raise UsageError(f"{place}: a part of type image names no image", EXAMPLE)
    return {"type": "image"}


def _address(place: str, given: Json, folder: Path | None) -> str:
    if not isinstance(given, str) or not given:
        raise UsageError(f"{place}: an image is not named by a path or an address", EXAMPLE)
    if given.startswith("file://"):
        given = given.removeprefix("file://")
    return given if is_address(given) or folder is None else str(folder / given)
