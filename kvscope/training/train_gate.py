"""Train a gate on texts or on traces, and write its file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.gate_options import GateDesign, TextWindows, TrainingSettings
from kvscope.core.memory import memory_explained
from kvscope.core.options import ModelSource
from kvscope.core.text_files import read_text, require_one_input
from kvscope.core.version import versions
from kvscope.gates.file import GateFacts
from kvscope.gates.module import LearnedGate
from kvscope.kernels.device import torch_device
from kvscope.model.loading import Loaded, load
from kvscope.model.obstacles import require_registry
from kvscope.model.sample import sample
from kvscope.model.selfcheck import self_check
from kvscope.model.token_ids import TextEncoder
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import Trace
from kvscope.training.fit import Evaluation, train
from kvscope.training.tasks import RecordedMass, Task, TextReading, Texts

JUDGED = 8  # windows of held-out text in an evaluation
CHECKPOINT = ".checkpoint"  # suffix of the checkpoint file

ProgressCallback = Callable[[int, Evaluation], None]  # number of the step, and the last evaluation


@dataclass(frozen=True)
class Trained:
    """A trained gate: its file, its facts, and all evaluations on held-out data, the first one before training."""

    path: Path
    facts: GateFacts
    log: list[Evaluation]

    @property
    def best(self) -> Evaluation:
        """Evaluation of the gate that was written."""
        return min(self.log, key=lambda evaluation: evaluation.total)


def train_on_texts(
    source: ModelSource,
    files: Sequence[Path],
    output: Path,
    *,
    design: GateDesign = GateDesign(),  # noqa: B008  frozen
    settings: TrainingSettings = TrainingSettings(),  # noqa: B008
    windows: TextWindows = TextWindows(),  # noqa: B008
    seed: int = 0,
    resume: bool = False,
    progress_callback: ProgressCallback | None = None,
) -> Trained:
    """Train the gates of a model on texts, and return the result; the model does not change.

    Parameters
    ----------
    source : ModelSource
        The model.
    files : sequence of Path
        UTF-8 texts; the last tenth of each is held out for evaluation.
    output : Path
        File to write; an existing file is replaced.
    design, settings : optional
        Design of the gate, and settings of the training.
    windows : TextWindows
        Length of the windows of text, and tokens per step.
    seed : int
        Seed of the initial parameters and of the windows.
    resume : bool
        Whether to continue from the checkpoint of an interrupted training with the same arguments.
    progress_callback : callable, optional
        Called after every step with its number and the last evaluation.

    Raises
    ------
    UsageError
        If a text is too short, a setting is out of range, or the checkpoint has other settings.
    ModelError
        If the model cannot be loaded, its attention cannot be observed, or a loss is not finite.
    """
    require_one_input(files)
    texts = [read_text(file) for file in files]
    loaded = load(source)
    require_registry(loaded.model)
    loaded.model.requires_grad_(False)
    drawn = _Windows(loaded, texts, windows.window, windows.batch, seed)
    gate = _untrained(loaded, design, drawn.held_out[0].ids, seed)
    sources = [
        {"file": file.name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for file, text in zip(files, texts, strict=True)
    ]
    about = {"task": "reading", "texts": sources, **asdict(windows), "seed": seed}
    task = TextReading(loaded.model, drawn.draw, drawn.held_out)
    return finish(gate, task, settings, output, about, resume, progress_callback)


def train_on_traces(
    traces: Sequence[Trace],
    output: Path,
    *,
    design: GateDesign = GateDesign(),  # noqa: B008  frozen
    settings: TrainingSettings = TrainingSettings(),  # noqa: B008
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    progress_callback: ProgressCallback | None = None,
) -> Trained:
    """Train gates on recorded attention to retain the keys of an optimal gate; the model does not run.

    Parameters
    ----------
    traces : sequence of Trace
        Traces of one model with layer inputs, together two sequences or more; every fifth sequence is held out.
    output, design, settings, seed, device, resume, progress_callback
        As in `train_on_texts`.

    Raises
    ------
    TraceError
        If a trace has no layer inputs or not all layers, or the traces are of different models.
    UsageError, ModelError
        As `train_on_texts`.
    """
    if not traces:
        raise UsageError("no trace is given", "Name one or more traces that were recorded with --hidden.")
    _require_equal_heads(traces[0].name, map(traces[0].heads_of, traces[0].layers))
    place = torch_device(device)
    task = RecordedMass(traces, settings.target_keep, design.form, seed, str(place))
    header = traces[0].header
    facts = GateFacts(
        model=str(header.model.id),
        layers=header.n_layers,
        hidden=traces[0].hidden(0, traces[0].layers[0]).shape[-1],
        kv_heads=header.kv_heads,
        **asdict(design),
    )
    torch.manual_seed(seed)
    gate = LearnedGate(facts, torch.tensor(header.model.weights)).to(place)
    named = [{"name": trace.name, "identity": trace.identity} for trace in traces]
    about = {"task": "distilled", "traces": named, "seed": seed}
    return finish(gate, task, settings, output, about, resume, progress_callback)


def finish(
    gate: LearnedGate,
    task: Task,
    settings: TrainingSettings,
    output: Path,
    about: Mapping[str, object],
    resume: bool = False,
    progress_callback: ProgressCallback | None = None,
) -> Trained:
    """Train a gate on a task and write its file; `about` describes the training data, for the provenance."""
    checkpoint = output.with_name(output.name + CHECKPOINT)
    with memory_explained(" while the gate was trained", "Lower --window, or use --device cpu."):
        log = train(
            gate,
            task,
            settings,
            checkpoint,
            data=about,
            resume=resume,
            progress_callback=progress_callback,
        )
    best = min(log, key=lambda evaluation: evaluation.total)
    installed = versions("torch", "transformers")
    found = {"keep": best.keep, "keep_by_layer": best.by_layer, "loss": best.loss, "best_step": best.step}
    gate.facts = replace(gate.facts, provenance={**asdict(settings), **about, **found, "versions": installed})
    gate.write(output)
    checkpoint.unlink(missing_ok=True)  # only now: on a full disk it is all that is left of the training
    return Trained(output, gate.facts, log)


def _require_equal_heads(name: str, layers: Iterable[LayerHeads]) -> None:
    """Raise ModelError if layers have different numbers of key/value heads: a gate has as many in every layer."""
    counts = sorted({own.kv_heads for own in layers})
    if len(counts) > 1:
        raise ModelError(
            f"the layers of {name} have {' or '.join(map(str, counts))} key/value heads, but a gate needs "
            "equally many in every layer",
            "Train a gate for a model whose layers have the same heads.",
        )


def _untrained(loaded: Loaded, design: GateDesign, ids: Tensor, seed: int) -> LearnedGate:
    """Return an untrained gate for a model, which is checked on the first tokens of ``[batch, T]``."""
    with torch.inference_mode():
        facts = self_check(loaded.model, ids[:1].to(loaded.device))
    config = loaded.text_config
    _require_equal_heads(loaded.name, facts.sizes.values())
    if list(facts.windows) != list(range(config.num_hidden_layers)):
        raise ModelError(f"{loaded.name} has layers without attention", "Use a model with attention in every layer.")
    torch.manual_seed(seed)
    shape = GateFacts(
        model=loaded.name,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv_heads=facts.kv_heads,
        **asdict(design),
    )
    return LearnedGate(shape, torch.tensor(sample(loaded.model))).to(loaded.device)


class _Windows:
    """Windows of texts: random ones from the first nine tenths of each text, evenly spaced ones from the last tenth."""

    def __init__(self, loaded: Loaded, texts: Sequence[str], window: int, batch: int, seed: int) -> None:
        encoder = TextEncoder(loaded.tokenizer)
        self._first = encoder.prefix
        self._window, self._batch, self._seed = window, batch, seed
        size = window - len(self._first)
        ids = [torch.tensor(encoder.without_prefix(encoder.encode(text)), dtype=torch.int64) for text in texts]
        cuts = [len(one) * 9 // 10 for one in ids]
        self._trained = [one[:cut] for one, cut in zip(ids, cuts, strict=True) if cut >= size]
        held_out = [one[cut:] for one, cut in zip(ids, cuts, strict=True) if len(one) - cut >= size]
        if not self._trained or not held_out:
            raise UsageError(
                f"no text has a window of {window} tokens for evaluation in its last tenth",
                "Name longer texts, or lower --window.",
            )
        starts = [(one, start) for one in held_out for start in range(0, len(one) - size + 1, size)]
        selected = starts[:: max(1, len(starts) // JUDGED)][:JUDGED]
        self.held_out = [self._texts([one[start : start + size]], window // 2) for one, start in selected]

    def draw(self, step: int) -> Texts:
        """Return the random windows of a step, which depend only on its number and the seed."""
        random = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        size = self._window - len(self._first)
        room = torch.tensor([len(one) - size + 1 for one in self._trained])
        places = [int(torch.randint(int(room.sum()), (1,), generator=random)) for _ in range(self._batch)]
        prompt = int(torch.randint(self._window // 4, self._window * 3 // 4 + 1, (1,), generator=random))
        return self._texts([self._at(place, room, size) for place in places], max(1, prompt))

    def _at(self, place: int, room: Tensor, size: int) -> Tensor:
        """Return window number `place`, counted over all texts; `room` is the number of windows of each text."""
        for one, count in zip(self._trained, room.tolist(), strict=True):
            if place < count:
                return one[place : place + size]
            place -= count
        raise AssertionError("place is below the sum of room")

    def _texts(self, parts: Sequence[Tensor], prompt: int) -> Texts:
        first = torch.tensor(self._first, dtype=torch.int64)
        ids = torch.stack([torch.cat([first, part]) for part in parts])
        return Texts(ids, torch.ones(ids.shape), prompt)
