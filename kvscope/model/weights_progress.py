"""How much of a model's weights transformers has loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_log

from kvscope.core.progress import Progress, weights_progress

LOOP = "Loading weights"  # how transformers describes its loop over the weights


@contextmanager
def weights_followed() -> Iterator[None]:
    """Tell the callback of `kvscope.core.progress.weights_shown` the share of weights that the block has loaded.

    A weight counts as one, whatever its size: a weight that is made from several of a file has no size before that.
    Transformers before 5.4 has no hook, and nothing is told.
    """
    progress, set_hook = weights_progress(), getattr(transformers_log, "set_tqdm_hook", None)
    if progress is None or set_hook is None:
        yield
        return

    def hook(factory: Callable[..., object], args: tuple[Iterable[object], ...], options: dict[str, object]) -> object:
        return _told(args[0], progress) if options.get("desc") == LOOP and args else factory(*args, **options)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)


def _told(weights: Iterable[object], progress: Progress) -> Iterator[object]:
    """Yield each weight, and tell the share of those before it."""
    listed = list(weights)
    for done, weight in enumerate(listed):
        progress(done / len(listed))
        yield weight
    progress(1.0)
