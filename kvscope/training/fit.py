"""Training a gate: steps, checkpoints, early stopping."""

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
from kvscope.gates.module import LearnedGate
from kvscope.training.objective import eviction_loss
from kvscope.training.tasks import Found, Task

CLIP = 1.0  # largest norm of a step's gradient


@dataclass(frozen=True)
class Look:
    """What a look at held-out data found, after some steps.

    Attributes
    ----------
    step : int
        Steps made.
    loss : float
        Of the task.
    keep : float
        Share of keys that stay, of all layers and heads.
    by_layer : list of float
        The same for each layer.
    total : float
        Loss of the task and eviction loss: what decides which gate is best.
    """

    step: int
    loss: float
    keep: float
    by_layer: list[float]
    total: float


@dataclass
class _State:
    """Where a training is: everything that the next step depends on."""

    step: int = 0
    best: float = math.inf
    since: int = 0  # looks since the best
    log: list[Look] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)  # of the best gate


def train(
    gate: LearnedGate,
    task: Task,
    settings: TrainingSettings,
    checkpoint: Path,
    *,
    resume: bool = False,
    progress_callback: Callable[[int, Look], None] | None = None,
) -> list[Look]:
    """Train a gate in place, and leave it as it was at its best; returns every look at held-out data.

    A step depends on its number, the gate and the state of the optimiser alone, so a training that goes on from a
    checkpoint is the training that was never interrupted.

    Parameters
    ----------
    gate : LearnedGate
        With parameters in float32.
    task : Task
        Gives losses.
    settings : TrainingSettings
        How.
    checkpoint : Path
        File that is written at every look, and removed at the end.
    resume : bool
        Whether to go on from that file.
    progress_callback : callable, optional
        Called after every step with its number and the last look.

    Raises
    ------
    UsageError
        If there is no checkpoint to go on from, or it was made with other settings.
    ModelError
        If the checkpoint is damaged, or a loss is not finite.
    """
    optimizer = torch.optim.Adam(gate.parameters(), lr=settings.rate)
    state = _State()
    if resume:
        state = _read(checkpoint, gate, optimizer, settings)
    else:
        _look(gate, task, settings, state)
    while state.step < settings.steps and state.since < settings.patience:
        _step(gate, task, settings, optimizer, state.step)
        state.step += 1
        if state.step % settings.every == 0 or state.step == settings.steps:
            _look(gate, task, settings, state)
            _write(checkpoint, gate, optimizer, settings, state)
        if progress_callback is not None:
            progress_callback(state.step, state.log[-1])
    gate.load_state_dict(state.parameters)
    checkpoint.unlink(missing_ok=True)
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


def _total(found: Found, settings: TrainingSettings, target: float) -> Tensor:
    loss, flags = found
    beyond = eviction_loss([layer.to(loss.device) for layer in flags], target, settings.eviction)
    return loss + settings.strength * beyond


@torch.no_grad()
def _look(gate: LearnedGate, task: Task, settings: TrainingSettings, state: _State) -> None:
    """Judge the gate on held-out data, and keep its parameters if it is the best."""
    losses, totals, shares = [], [], []
    for loss, flags in task.held_out(gate):
        losses.append(float(loss))
        totals.append(float(_total((loss, flags), settings, settings.target_keep)))
        shares.append([float(layer.mean()) for layer in flags])
    by_layer = [sum(layer) / len(layer) for layer in zip(*shares, strict=True)]
    total = sum(totals) / len(totals)
    state.log.append(Look(state.step, sum(losses) / len(losses), sum(by_layer) / len(by_layer), by_layer, total))
    state.since += 1
    if total < state.best:
        state.best, state.since = total, 0
        state.parameters = {name: value.clone() for name, value in gate.state_dict().items()}


def _write(
    path: Path, gate: LearnedGate, optimizer: torch.optim.Optimizer, settings: TrainingSettings, state: _State
) -> None:
    tensors = {f"now.{name}": value for name, value in gate.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in state.parameters.items()}
    for name, parameter in gate.named_parameters():
        tensors |= {f"adam.{kind}.{name}": value for kind, value in optimizer.state[parameter].items()}
    about = {"step": state.step, "best": state.best, "since": state.since, "log": [asdict(look) for look in state.log]}
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.write_bytes(
        save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            {"settings": json.dumps(asdict(settings)), "facts": _facts(gate), "state": json.dumps(about)},
        )
    )
    unfinished.replace(path)


def _read(path: Path, gate: LearnedGate, optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> _State:
    """Put gate and optimiser where a checkpoint left them, and return the rest of its state."""
    if not path.is_file():
        raise UsageError(f"no checkpoint {path} to go on from", "Start anew: leave --resume out.")
    try:
        with safe_open(path, "pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if json.loads(about["settings"]) != asdict(settings) or about["facts"] != _facts(gate):
            raise UsageError(f"checkpoint {path} was made with other settings", "Resume with those of the first run.")
        gate.load_state_dict(_part(tensors, "now."))
        device = next(gate.parameters()).device
        for name, parameter in gate.named_parameters():
            kinds = {kind: tensors[f"adam.{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {k: value if k == "step" else value.to(device) for k, value in kinds.items()}
        found: dict[str, Any] = json.loads(about["state"])
        log = [Look(**look) for look in found.pop("log")]
        return _State(**found, log=log, parameters=_part(tensors, "best."))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"checkpoint {path} is damaged", "Start anew: leave --resume out.") from error


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _facts(gate: LearnedGate) -> str:
    return json.dumps(asdict(gate.facts))
