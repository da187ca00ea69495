"""Which layers read the cache of an earlier one, where a model hands what is cached from layer to layer.

transformers passes such keys and values, or latent vectors, as ``shared_kv_states``: one layer stores an entry, others
read it. This works for layers whose attention calls cannot be observed; where they can, the keys themselves are
compared (`kvscope.model.selfcheck.shared_caches`).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kvscope.core.model_types import CausalModel

GIVEN = "shared_kv_states"  # argument of attention modules


class _Watched(UserDict[str, Any]):
    """What a layer is given: the entries of the model, in which it is noted who stores and who reads them."""

    def __init__(self, entries: UserDict[str, Any], layer: int, owners: dict[str, int], found: dict[int, int]) -> None:
        self.data = entries  # type: ignore[assignment]  # reads and writes go to the model's own
        self._layer, self._owners, self._found = layer, owners, found

    def __getitem__(self, key: str) -> Any:
        if self._owners.get(key, self._layer) != self._layer:
            self._found[self._layer] = self._owners[key]
        return super().__getitem__(key)

    def __setitem__(self, key: str, item: Any) -> None:
        self._owners[key] = self._layer
        super().__setitem__(key, item)


def shared_states(model: CausalModel, ids: Tensor) -> dict[int, int]:
    """Return, for each layer that reads what an earlier one has stored, that layer; from a pass over ids ``[1, n]``."""
    owners: dict[str, int] = {}
    found: dict[int, int] = {}

    def given(layer: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entries = kwargs.get(GIVEN)
            return None if entries is None else (args, {**kwargs, GIVEN: _Watched(entries, layer, owners, found)})

        return watch

    modules = [part for part in model.modules() if isinstance(getattr(part, "layer_idx", None), int)]
    hooks = [part.register_forward_pre_hook(given(part.layer_idx), with_kwargs=True) for part in modules]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
