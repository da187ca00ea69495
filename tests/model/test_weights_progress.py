"""The share of a model's weights that is loaded, as transformers loads them one by one."""

from __future__ import annotations

import pytest
from transformers.utils import logging as transformers_log

from kvscope.core.options import ModelSource
from kvscope.core.progress import weights_progress, weights_shown
from kvscope.model.loading import load
from kvscope.model.weights_progress import weights_followed


def test_the_share_grows_with_every_weight() -> None:
    told: list[float] = []
    with weights_shown(told.append):
        loaded = load(ModelSource("demo"))
    assert told == sorted(told) and (told[0], told[-1]) == (0, 1)
    assert len(told) >= len(dict(loaded.model.named_parameters()))
    assert weights_progress() is None


def test_other_loops_of_transformers_are_left_as_they_are() -> None:
    told: list[float] = []
    with weights_shown(told.append), weights_followed():
        assert list(transformers_log.tqdm([1, 2], desc="Loading adapters")) == [1, 2]
    assert told == []


def test_the_hook_is_gone_after_loading_and_after_an_error() -> None:
    mine = transformers_log.set_tqdm_hook(None)
    try:
        with pytest.raises(RuntimeError, match="broken"), weights_shown(lambda share: None), weights_followed():
            raise RuntimeError("broken")
        assert transformers_log.set_tqdm_hook(None) is None
    finally:
        transformers_log.set_tqdm_hook(mine)
