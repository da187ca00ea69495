"""The images of the prompts of a trace, read again: the trace has their paths and checksums, not their pixels."""

from __future__ import annotations

from torch import Tensor

from kvscope.core.errors import TraceError, UsageError
from kvscope.model.image_files import ImageFile, read_image
from kvscope.model.image_prompts import ImageInputs, inputs_again
from kvscope.model.loading import Loaded
from kvscope.model.processors import processor_of
from kvscope.trace.prompt_parts import ImageRecord
from kvscope.trace.reader import Trace

OPEN = "replay the trace in the open loop: kvscope replay without --perplexity."


def images_of(trace: Trace, loaded: Loaded, sequence: int, ids: Tensor) -> ImageInputs | None:
    """Return what the model reads of the images of a sequence with ids ``[T]``; None if its prompt has none.

    Raises
    ------
    TraceError
        If an image cannot be read, or is not the one that was recorded; if the model generated tokens of images.
    UsageError, ModelError
        If the model reads no images, or reads them as other numbers of tokens.
    """
    record = trace.record.sequences[sequence]
    if not record.images:
        return None
    place = f"{sequence} of {trace.path}"
    files = [_again(trace, number, image) for number, image in enumerate(record.images, 1)]
    processor_of(loaded, place)
    inputs = inputs_again(loaded, place, ids[: record.prompt].tolist(), files)
    if bool((ids[record.prompt :] == inputs.token).any()):
        raise TraceError(
            f"in sequence {sequence} of {trace.path} the model generated tokens that stand for images, which cannot be "
            "read in one pass",
            f"Record it with --do-sample or another prompt, or {OPEN}",
        )
    return inputs


def _again(trace: Trace, number: int, image: ImageRecord) -> ImageFile:
    try:
        file = read_image(image.file, f"of {trace.path}")
    except UsageError as error:
        raise TraceError(
            f"the closed loop needs the images of {trace.path} again: {error.what}",
            f"Put image {number} back where it was, or {OPEN}",
        ) from error
    if file.sha256 != image.sha256:
        raise TraceError(
            f"image {number} of {trace.path}, {image.file}, was changed since it was recorded: its checksum differs",
            f"Put the recorded image back, or {OPEN}",
        )
    return file
