"""The file of a gate: parameters in safetensors, and in the metadata its sizes, design and provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.gate_options import GateForm
from kvscope.core.json_records import FieldError, decode, parse
from kvscope.core.seal import SEAL, is_changed, sealed

KIND, VERSION = "kvscope-gate", 1  # key in the metadata, and version of the format
DEMO = "demo"
BESIDE = "gate.safetensors"  # file name of a gate in the folder of its model
WEIGHTS = "weights"  # tensor with a sample of the model's weights, which identifies the model
AGAIN = "Name a file that kvscope gate train wrote."


@dataclass(frozen=True)
class GateFacts:
    """Facts about a gate: its model, its design and its training.

    Attributes
    ----------
    model : str
        Name of the model that it was trained for.
    layers, hidden, kv_heads : int
        Sizes of the model: layers, size of a layer input, key/value heads.
    heads, size : int
        Heads of the gate's attention, and the size of a head.
    form : GateForm
        ``causal``: the gate of a token attends to the tokens up to it; ``bidirectional``: gates of the prompt attend to
        the whole prompt.
    tau : float
        A key whose gate value is at or below this is evicted.
    sinks : int
        Number of first tokens that are never evicted.
    provenance : dict
        Settings, losses, seed, hashes of the training texts, and versions.
    """

    model: str
    layers: int
    hidden: int
    kv_heads: int
    heads: int = 2
    size: int = 16
    form: GateForm = GateForm.causal
    tau: float = 0.5
    sinks: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    def metadata(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the facts and a checksum of the tensors as metadata of a safetensors file, under one key."""
        return {KIND: json.dumps(sealed({"version": VERSION, **asdict(self), "tensors": digest_of(tensors)}))}

    def require_prefill(self, prefill: str, name: str) -> None:
        """Raise UsageError if the gate called `name` cannot be used with a prefill mode."""
        if self.form == "bidirectional" and prefill != "full":
            raise UsageError(
                f"gate {name} looks at the whole prompt, and streaming prefill evicts before its end",
                "Use --prefill full, or a gate that was trained with --form causal.",
            )


def path_of(name: str) -> Path:
    """Return the path of a gate file; ``demo`` is the gate of the bundled model.

    Raises
    ------
    UsageError
        If there is no such file.
    """
    path = Path(str(files("kvscope.model") / "demo" / BESIDE)) if name == DEMO else Path(name)
    if not path.is_file():
        raise UsageError(f"no gate {name}: {path} is not a file", "Train one: kvscope gate train, or use gate=demo.")
    return path


def read_facts(name: str) -> GateFacts:
    """Return the facts about a gate, without loading its parameters.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If the file is not a gate, damaged, or from a newer kvscope.
    """
    path = path_of(name)
    try:
        with safe_open(path, "pt") as file:
            found: Mapping[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a gate: {error}".splitlines()[0], AGAIN) from error
    if KIND not in found:
        raise ModelError(f"{path} is not a gate of kvscope", AGAIN)
    about = _parsed(found[KIND], path)
    version = about.pop("version", None)
    if type(version) is int and version > VERSION:
        raise ModelError(f"gate {path} has format {version}, newer than this kvscope reads", "Update kvscope.")
    for name in ("tensors", SEAL):
        about.pop(name, None)
    try:
        if version != VERSION:
            raise FieldError("version", f"{version!r} is none")
        return decode(about, GateFacts)
    except FieldError as error:
        raise ModelError(f"gate {path} is damaged: {error}", AGAIN) from error


def require_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError unless the tensors of a gate are those that its metadata has the checksum of, if it has one."""
    with safe_open(path, "pt") as file:
        stated = _parsed(file.metadata()[KIND], path).get("tensors")
    if stated is not None and stated != digest_of(tensors):
        raise ModelError(f"gate {path} is damaged: its parameters differ from their checksum", AGAIN)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of names, types, shapes and numbers of tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        about = parse(text.encode())
    except ValueError as error:
        raise ModelError(f"gate {path} is damaged: its metadata is not JSON", AGAIN) from error
    if not isinstance(about, dict) or is_changed(about):
        raise ModelError(f"gate {path} is damaged: its metadata differs from its checksum", AGAIN)
    return about
