"""The file of a gate: safetensors with its parameters, and in its metadata what it is and where it is from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.gate_options import GateForm

KIND, VERSION = "kvscope-gate", 1  # key of the metadata, and of what is there
DEMO = "demo"
BESIDE = "gate.safetensors"  # name of a gate that comes with a model, in its folder
WEIGHTS = "weights"  # tensor of some of the model's weights, by which it is known again
AGAIN = "Name a file that kvscope gate train wrote."


@dataclass(frozen=True)
class GateFacts:
    """What a gate is.

    Attributes
    ----------
    model : str
        Name of the model that it was trained for.
    layers, hidden, kv_heads : int
        Sizes of the model: layers, numbers of a layer's input, key/value heads.
    heads, size : int
        Heads of the gate's own attention, and the size of one.
    form : GateForm
        Whether a token's gate looks at the tokens up to its own alone, or those of a prompt look at the whole prompt.
    tau : float
        A key whose gate is at or below this is evicted.
    sinks : int
        First tokens whose gates are always open.
    provenance : dict
        How it was trained: targets, losses, seed, texts and their hashes, versions.
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

    def metadata(self) -> dict[str, str]:
        """Return the facts as metadata of a safetensors file: under one key, since these have no order."""
        return {KIND: json.dumps({"version": VERSION, **asdict(self)})}

    def require_prefill(self, prefill: str, name: str) -> None:
        """Raise UsageError where the gate `name` makes no sense under a prefill."""
        if self.form == "bidirectional" and prefill != "full":
            raise UsageError(
                f"gate {name} looks at the whole prompt, and streaming prefill evicts before its end",
                "Use --prefill full, or a gate that was trained with --form causal.",
            )


def path_of(name: str) -> Path:
    """Return the file of a gate: a path, or ``demo`` for that of the bundled model.

    Raises
    ------
    UsageError
        If there is none.
    """
    path = Path(str(files("kvscope.model") / "demo" / BESIDE)) if name == DEMO else Path(name)
    if not path.is_file():
        raise UsageError(f"no gate {name}: {path} is no file", "Train one: kvscope gate train, or use gate=demo.")
    return path


def read_facts(name: str) -> GateFacts:
    """Return what a gate is, without its parameters.

    Raises
    ------
    UsageError
        If there is no such file.
    ModelError
        If it is no gate, damaged, or of a newer kvscope.
    """
    path = path_of(name)
    try:
        with safe_open(path, "pt") as file:
            found: Mapping[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ModelError(f"gate {path} is damaged or no gate: {error}".splitlines()[0], AGAIN) from error
    if KIND not in found:
        raise ModelError(f"{path} is not a gate of kvscope", AGAIN)
    about = json.loads(found[KIND])
    version = about.pop("version")
    if version > VERSION:
        raise ModelError(f"gate {path} has format {version}, newer than this kvscope reads", "Update kvscope.")
    return GateFacts(**about)
