"""Signals that come from the parameters of a model, and not from what its attention is called with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signals import rotary_signal
from kvscope.model.rotary import rotary_records


@dataclass(frozen=True)
class ModelSignals:
    """Parameters of a model that policies read, as far as some plans need them.

    Attributes
    ----------
    rotary : mapping of int to Tensor
        Of each layer the signal ``rotary``, float64 ``[4, D]``.
    """

    rotary: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: CausalModel, plans: Iterable[EvictionPlan], token: Tensor) -> ModelSignals:
        """Return what some plans need of a model.

        Parameters
        ----------
        model, plans
            The model, and the plans that are to run in it.
        token : Tensor
            One token, ``[1, 1]``.

        Raises
        ------
        ModelError
            If the model has no rotary embedding that numbers describe, and a plan reads it.
        """
        reads = [plan for plan in plans if "rotary" in plan.needs]
        if not reads:
            return cls()
        try:
            found = rotary_records(model, token)
        except ModelError as error:
            raise ModelError(
                f"{reads[0].policy.label} needs a rotary embedding with fixed frequencies, which a layer of "
                f"{type(model).__name__} has not",
                "Use another policy for this model.",
            ) from error
        signals = {layer: torch.from_numpy(rotary_signal(record)) for record in found for layer in record.layers}
        return cls({layer: signal.to(token.device) for layer, signal in signals.items()})
