"""Train a gate: steps, checkpoints, early stopping."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.gate_options import TrainingSettings
from kvscope.core.json import JsonDict
from kvscope.core.output import replace_file
from kvscope.core.seal import SEAL, seal_of
from kvscope.gates.file import digest_of
from kvscope.gates.module import LearnedGate
from kvscope.training.objective import eviction_loss
from kvscope.training.tasks import LossAndFlags, Task

CLIP = 1.0  # largest norm of a step's gradient


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation on held-out data.

    Attributes
    ----------
    step : int
        Steps completed.
    loss : float
        Loss of the task.
    keep : float
        Share of keys that are retained, mean over layers and heads.
    by_layer : list of float
        The same share for each layer.
    total : float
        Task loss plus eviction loss; the gate with the smallest total is the best.
    """

    step: int
    loss: float
    keep: float
    by_layer: list[float]
    total: float


@dataclass
class _State:
    """State of a training: with the gate and the optimiser, all that the next step depends on."""

    step: int = 0
    best: float = math.inf
    since: int = 0  # evaluations since the best one
    log: list[Evaluation] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # parameters of the best gate


def train(
    gate: LearnedGate,
    task: Task,
    settings: TrainingSettings,
    checkpoint: Path,
    *,
    data: Mapping[str, object] | None = None,
    resume: bool = False,
    progress_callback: Callable[[int, Evaluation], None] | None = None,
) -> list[Evaluation]:
    """Train a gate in place, restore its best parameters, and return all evaluations on held-out data.

    A step depends only on its number, the gate and the state of the optimiser, so resuming from a checkpoint gives the
    same result as training without interruption.

    Parameters
    ----------
    gate : LearnedGate
        With parameters in float32.
    task : Task
        Computes the losses.
    settings : TrainingSettings
        Steps, learning rate, target and stopping rule.
    checkpoint : Path
        File that is written at every evaluation. It is not removed: the caller does so once the gate is written.
    data : mapping of str to JSON, optional
        What the training data is: texts or traces, windows, seed.
    resume : bool
        Whether to continue from that file.
    progress_callback : callable, optional
        Called after every step with its number and the last evaluation.

    Raises
    ------
    UsageError
        If there is no checkpoint to resume from, or it was written with other settings or data.
    ModelError
        If the checkpoint is damaged, or a loss is not finite.
    """
    optimizer = torch.optim.Adam(gate.parameters(), lr=settings.rate)
    state = _State()
    if resume:
        state = _read(checkpoint, gate, optimizer, settings, data)
    else:
        _evaluate(gate, task, settings, state)
    while state.step < settings.steps and state.since < settings.patience:
        _step(gate, task, settings, optimizer, state.step)
        state.step += 1
        if state.step % settings.every == 0 or state.step == settings.steps:
            _evaluate(gate, task, settings, state)
            _write(checkpoint, gate, optimizer, settings, data, state)
        if progress_callback is not None:
            progress_callback(state.step, state.log[-1])
    gate.load_state_dict(state.parameters)
    return state.log


def _step(
    gate: LearnedGate, task: Task, settings: TrainingSettings, optimizer: torch.optim.Optimizer, number: int
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = settings.rate * 0.5 * (1 + math.cos(math.pi * number / settings.steps))
    loss = _total(task.step(gate, number), settings, settings.target(number))
    if not bool(torch.isfinite(loss)):
        raise ModelError(f"the loss of step {number} is not finite", "Lower --rate, or use --dtype float32.")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(gate.parameters(), CLIP)
    optimizer.step()


def _total(found: LossAndFlags, settings: TrainingSettings, target: float) -> Tensor:
    loss, flags = found
    penalty = eviction_loss([layer.to(loss.device) for layer in flags], target, settings.eviction)
    return loss + settings.strength * penalty


@torch.no_grad()
def _evaluate(gate: LearnedGate, task: Task, settings: TrainingSettings, state: _State) -> None:
    """Evaluate the gate on held-out data, and store its parameters if it is the best so far."""
    losses, totals, shares = [], [], []
    for loss, flags in task.held_out(gate):
        losses.append(float(loss))
        totals.append(float(_total((loss, flags), settings, settings.target_keep)))
        shares.append([float(layer.mean()) for layer in flags])
    by_layer = [sum(layer) / len(layer) for layer in zip(*shares, strict=True)]
    total = sum(totals) / len(totals)
    keep = sum(by_layer) / len(by_layer)
    state.log.append(Evaluation(state.step, sum(losses) / len(losses), keep, by_layer, total))
    state.since += 1
    if total < state.best:
        state.best, state.since = total, 0
        state.parameters = {name: value.clone() for name, value in gate.state_dict().items()}


def _write(
    path: Path,
    gate: LearnedGate,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    data: Mapping[str, object] | None,
    state: _State,
) -> None:
    tensors = {f"now.{name}": value for name, value in gate.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.parameters.items()}
    for name, parameter in gate.named_parameters():
        tensors |= {f"adam.{kind}.{name}": value for kind, value in optimizer.state[parameter].items()}
    log = [asdict(evaluation) for evaluation in state.log]
    about = {"step": state.step, "best": state.best, "since": state.since, "log": log}
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    said: JsonDict = {
        "settings": json.dumps(asdict(settings)),
        "data": _data(data),
        "facts": _facts(gate),
        "state": json.dumps(about),
    }
    seal = seal_of({**said, "tensors": digest_of(stored)})
    replace_file(path, save(stored, {**{name: str(text) for name, text in said.items()}, SEAL: seal}))


def _read(
    path: Path,
    gate: LearnedGate,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    data: Mapping[str, object] | None,
) -> _State:
    """Restore gate and optimiser from a checkpoint, and return the rest of its state."""
    if not path.is_file():
        raise UsageError(f"no checkpoint {path} to resume from", "Omit --resume to start again.")
    try:
        with safe_open(path, "pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said = {name: text for name, text in about.items() if name != SEAL}
        if seal_of({**said, "tensors": digest_of(tensors)}) != about[SEAL]:
            raise ModelError(f"checkpoint {path} is damaged: its checksum differs", "Omit --resume to start again.")
        if json.loads(about["settings"]) != asdict(settings) or about["facts"] != _facts(gate):
            raise UsageError(
                f"checkpoint {path} was made with other settings", "Resume with the settings of the first run."
            )
        if about["data"] != _data(data):
            raise UsageError(
                f"checkpoint {path} was made with other training data or another seed",
                "Resume with the texts or traces, windows and seed of the first run, or omit --resume.",
            )
        gate.load_state_dict(_part(tensors, "now."))
        device = next(gate.parameters()).device
        for name, parameter in gate.named_parameters():
            kinds = {kind: tensors[f"adam.{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {k: value if k == "step" else value.to(device) for k, value in kinds.items()}
        found: dict[str, Any] = json.loads(about["state"])
        log = [Evaluation(**evaluation) for evaluation in found.pop("log")]
        return _State(**found, log=log, parameters=_part(tensors, "best."))
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"checkpoint {path} is damaged", "Omit --resume to start again.") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _data(data: Mapping[str, object] | None) -> str:
    return json.dumps(data, sort_keys=True)


def _facts(gate: LearnedGate) -> str:
    return json.dumps(asdict(gate.facts))
