"""The experiment trackers that a replay can be exported to."""

from __future__ import annotations

from enum import StrEnum


class Tracker(StrEnum):
    """An experiment tracker; each is an extra of the same name."""

    wandb = "wandb"
    mlflow = "mlflow"
    tensorboard = "tensorboard"
