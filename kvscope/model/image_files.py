"""Read the images of prompts: local files, and addresses where the caller passes a function that reads them."""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kvscope.core.errors import UsageError

MOST_BYTES = 256 * 2**20  # of a file: a larger one is no picture that a person looks at
MOST_PIXELS = 100_000_000  # decoded, 300 MB; processors scale images to a few megapixels at most
ReadAddress = Callable[[str, int], bytes]  # address and limit -> at most so many bytes of it


@dataclass(frozen=True)
class ImageFile:
    """An image that was read.

    Attributes
    ----------
    name : str
        Its path or address.
    sha256 : str
        Of the bytes of the file.
    width, height : int
        Pixels.
    picture : PIL.Image.Image or None
        Decoded to RGB, turned as its EXIF data says; None once the processor has read it.
    """

    name: str
    sha256: str
    width: int
    height: int
    picture: Any


def read_image(name: str, place: str, read_address: ReadAddress | None = None) -> ImageFile:
    """Return an image by its path or address; `place` is the prompt that names it.

    Raises
    ------
    UsageError
        If there is no such file, it is not an image or damaged, or it is too large; if it is an address and
        `read_address` is None; if Pillow is not installed.
    ShareError
        By `read_address`.
    """
    content = _content(name, place, read_address)
    if len(content) > MOST_BYTES:
        raise UsageError(
            f"prompt {place}: image {_short(name)} has more than {MOST_BYTES // 2**20} MiB", "Scale the image down."
        )
    opener = pillow(place)
    try:
        with opener.open(io.BytesIO(content)) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise UsageError(
                    f"prompt {place}: image {_short(name)} has {width:,} x {height:,} pixels, more than "
                    f"{MOST_PIXELS // 10**6} million",
                    "Scale the image down.",
                )
            turned = importlib.import_module("PIL.ImageOps").exif_transpose(opened).convert("RGB")
    except UsageError:
        raise
    except Exception as error:  # decoders raise errors of many kinds for damaged files
        # ``cannot identify image file <_io.BytesIO object ...>`` says nothing to a user
        why = "it is not an image that Pillow reads" if "BytesIO" in str(error) else str(error).splitlines()[0]
        raise UsageError(
            f"prompt {place}: image {_short(name)} cannot be read: {why}", "Name a PNG, JPEG or WebP file."
        ) from error
    return ImageFile(name, hashlib.sha256(content).hexdigest(), turned.width, turned.height, turned)


def is_address(name: str) -> bool:
    """Return whether an image is named by an address, as ``https://...`` or ``data:...``, and not by a path."""
    return "://" in name or name.startswith("data:")


def _content(name: str, place: str, read_address: ReadAddress | None) -> bytes:
    if is_address(name):
        if read_address is None or name.startswith("data:"):
            raise UsageError(
                f"prompt {place}: image {_short(name)} is an address, not a file", "Save it, and name the file."
            )
        return read_address(name, MOST_BYTES + 1)
    path = Path(name)
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            return bytes(MOST_BYTES + 1)  # too large, which the caller says
        return path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"prompt {place}: image {name} cannot be read: {why}",
            "Check its path, which is relative to the file that names it.",
        ) from error


def pillow(place: str) -> ModuleType:
    """Return the module that opens images; raises UsageError if it is not installed, for the images of a prompt."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise UsageError(
            f"prompt {place} has images, which need the package Pillow, and that is not installed",
            'Install it: pip install "kvscope[images]"',
        ) from error


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:60]}..."
