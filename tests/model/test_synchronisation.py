"""Recording does not wait for the device: what the host reads in the model's thread does not grow with the tokens.

On a CPU nothing waits, so the operations that would wait on a device are counted, and the methods that read a tensor.
"""

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from kvscope.core.recording_options import Sampling
from kvscope.model.loading import Loaded
from kvscope.model.pipeline import Pipeline
from kvscope.model.prompt_files import PromptText
from kvscope.model.prompts import Prompt
from kvscope.model.recorder import Recorder
from kvscope.model.run import RecordingRun
from kvscope.model.sampling import chooser
from kvscope.trace.reader import open_trace
from kvscope.trace.schema import STORES, parse_store
from kvscope.trace.writer import TraceWriter
from tests.model.tiny import build, tokens
from tests.trace.make import header

# They need numbers or sizes that only the device knows.
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
READING = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")
AT_THE_END = 3  # reads of a whole sequence: its tokens, log-probabilities and entropies
PROMPT, NEW = 12, 9
PROMPT_IDS = tokens(PROMPT)[0].tolist()


class Waits(TorchDispatchMode):
    """Counts what waits for a device in this thread: operations, and calls of methods that read a tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.thread = threading.current_thread()
        for name in READING:
            self._count(monkeypatch, name, getattr(torch.Tensor, name))

    def _count(self, monkeypatch: pytest.MonkeyPatch, name: str, method: Any) -> None:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is self.thread:
                self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def plain(model: Any, new: int) -> None:
    """Decode without recording."""
    cache, token = DynamicCache(config=model.config), tokens(PROMPT)
    for _ in range(new + 1):
        token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


def recorded(model: Any, new: int, store: str, path: Path, heads: list[int]) -> None:
    """Record a prompt and at most `new` tokens of greedy decoding."""
    name, top = parse_store(store)
    facts = replace(header(heads=len(heads) or 4, kv_heads=len(heads) // 2 or 2, stored=list(STORES[name])), top=top)
    windows = [getattr(model.config, "sliding_window", None)] * 2
    facts = replace(facts, layers=[0, 1], n_layers=2, head_dim=8, sliding_window=windows)
    with TraceWriter(path, facts) as writer:
        with Pipeline(2) as pipeline:
            recorder = Recorder(writer, [0, 1], 4, store=store, heads=heads, pipeline=pipeline)
            run = RecordingRun(Loaded(model, _Words(), "tiny", "tiny", None), writer, recorder, None, PROMPT + new)
            prompt = Prompt(PromptText("prompt", "", None), "", PROMPT_IDS)
            made = run.record(0, prompt, new, chooser(Sampling(do_sample=False), 0))
        writer.finish([made])


class _Words:
    """A tokenizer whose token is its number."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(map(str, ids))


def waits(monkeypatch: pytest.MonkeyPatch, action: Any, *args: Any) -> Counter[str]:
    with monkeypatch.context() as patch, torch.inference_mode(), Waits(patch) as counted:
        action(*args)
    return counted.counts


@pytest.mark.parametrize("store", ["maps+vectors", "maps", "qkv", "topk:3"])
@pytest.mark.parametrize(("name", "heads"), [("llama", []), ("llama", [2, 3]), ("mistral", []), ("gpt_oss", [])])
def test_the_model_never_waits_for_what_is_recorded(
    name: str, heads: list[int], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    model.generation_config.eos_token_id = None
    counts = []
    for new in (NEW, 2 * NEW):
        own = waits(monkeypatch, plain, model, new)  # transformers' own
        counted = waits(monkeypatch, recorded, model, new, store, tmp_path / str(new), heads)
        counts.append(counted - own)
    assert counts[0] == counts[1], "reads do not grow with the tokens, and so not with layers or steps"
    assert counts[0] == {"numpy": AT_THE_END}


def test_with_stop_tokens_each_token_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [10**6]
    counts = [waits(monkeypatch, recorded, model, new, "maps", tmp_path / str(new), []) for new in (NEW, 2 * NEW)]
    assert counts[1] - counts[0] == {"numpy": NEW}


@torch.inference_mode()
def test_recording_ends_with_a_stop_token(tmp_path: Path) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = None
    recorded(model, NEW, "maps", tmp_path / "all", [])
    whole = open_trace(tmp_path / "all").tokens(0)
    assert len(whole) == PROMPT + NEW
    stop = int(whole["token_id"][PROMPT + 2])
    first = whole["token_id"][PROMPT:].tolist().index(stop)  # it may have come before
    model.generation_config.eos_token_id = stop
    recorded(model, NEW, "maps", tmp_path / "stopped", [])
    made = open_trace(tmp_path / "stopped")
    assert made.tokens(0).equals(whole[: PROMPT + first + 1])
    assert made.sequences[0].length == PROMPT + first + 1
    assert made.attention(0, 1).shape[1] == PROMPT + first + 1
    assert np.allclose(made.row_sums(0, 1), 1), "the stop token has its rows too"
