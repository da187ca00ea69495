"""Safetensors files of tensors and the facts about them: both have a checksum, so that damage is found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.json_records import FieldError, decode, parse
from kvscope.core.output import replace_file
from kvscope.core.seal import SEAL, is_changed, sealed
from kvscope.gates.file import DEMO, digest_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SAME = 0.01  # relative tolerance when weights of models are compared, above the error of rounding to 16 bit
Facts = TypeVar("Facts", bound="DataclassInstance")


def same_weights(known: Tensor, found: Tensor) -> bool:
    """Return whether two samples of weights, ``[n]``, are of one model, up to rounding to 16 bit."""
    return known.shape == found.shape and bool(
        (known - found).abs().le(SAME * (known.abs() + known.abs().mean())).all()
    )


@dataclass(frozen=True)
class FileKind:
    """A kind of such files.

    Attributes
    ----------
    key : str
        Key of the facts in the metadata.
    version : int
        Version of the format.
    name : str
        What the files hold, in the plural, for messages.
    beside : str
        Name of the file in the folder of the bundled model.
    todo : str
        How such a file is made, for messages.
    """

    key: str
    version: int
    name: str
    beside: str
    todo: str

    def path_of(self, name: str) -> Path:
        """Return the path of a file, or of that of the bundled model for ``demo``; raises UsageError without one."""
        path = Path(str(files("kvscope.model") / "demo" / self.beside)) if name == DEMO else Path(name)
        if not path.is_file():
            raise UsageError(f"no {self.name} {name}: {path} is not a file", self.todo)
        return path

    def write(self, path: Path, facts: DataclassInstance, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors and facts to `path`; an existing file is replaced atomically."""
        about = sealed({"version": self.version, **asdict(facts), "tensors": digest_of(tensors)})
        replace_file(path, save(dict(tensors), {self.key: json.dumps(about)}))

    def read(self, path: Path, facts: type[Facts]) -> tuple[Facts, dict[str, Tensor]]:
        """Return the facts in a file, and its tensors.

        Raises
        ------
        ModelError
            If the file holds something else, is damaged, or of a newer kvscope.
        """
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(self.key)
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged or holds no {self.name}: {error}".splitlines()[0], self.todo
            ) from error
        if text is None:
            raise ModelError(f"{path} holds no {self.name} of kvscope", self.todo)
        try:
            return decode(self._parsed(text, path, tensors), facts), tensors
        except ValueError as error:
            raise self.damaged(path, str(error)) from error

    def damaged(self, path: Path, why: str) -> ModelError:
        """Return the error for a file that is damaged."""
        return ModelError(f"{self.name} {path} are damaged: {why}", self.todo)

    def _parsed(self, text: str, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        about = parse(text.encode())
        if not isinstance(about, dict) or is_changed(about):
            raise FieldError("sha256", "it differs")
        version, digest = about.pop("version", None), about.pop("tensors", None)
        about.pop(SEAL, None)
        if isinstance(version, int) and version > self.version:
            raise ModelError(
                f"{self.name} {path} have format {version}, newer than this kvscope reads", "Update kvscope."
            )
        if version != self.version or digest != digest_of(tensors):
            raise FieldError("tensors", "they differ from their checksum")
        return about
