"""Reads the file of an offline run of Weights & Biases: a log as LevelDB writes it, of messages that wandb defines."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

BLOCK, HEAD = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What wandb would upload of a run."""

    id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def messages(file: Path) -> Iterator[bytes]:
    """Yield the messages of a log; fails at a checksum that differs."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK  # the rest of a block is empty
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        content = data[at + HEAD : at + HEAD + length]
        assert crc32(bytes([kind]) + content) == checksum
        at += HEAD + length
        parts += content
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def read(file: Path) -> OfflineRun:
    """Return what is in the file of a run."""
    from wandb.proto import wandb_internal_pb2 as wandb

    found = OfflineRun()
    for message in messages(file):
        record = wandb.Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.id, found.name, found.group, found.project = run.run_id, run.display_name, run.run_group, run.project
            found.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "summary":
            found.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "history":
            found.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _key(item: Any) -> str:
    return str(item.key or "/".join(item.nested_key))
