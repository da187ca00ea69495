"""Whether a model attends to images as a trace can hold it: every token to itself and those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kvscope.core.errors import ModelError
from kvscope.core.memory import is_out_of_memory
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.call_parts import HIDDEN_KEY
from kvscope.model.explain import first_line
from kvscope.model.loading import Loaded
from kvscope.model.prompts import Prompt


def check_images(loaded: Loaded, prompts: Sequence[Prompt]) -> None:
    """Run the first prompt with images once, so that what cannot be recorded is refused before a recording starts.

    Raises
    ------
    ModelError
        If tokens of an image attend to later ones, or the model fails on the images.
    """
    prompt = next((each for each in prompts if each.inputs is not None), None)
    if prompt is None or prompt.inputs is None:
        return
    ids = torch.tensor([prompt.ids], device=loaded.device)
    forget_positions(loaded.model)
    observer = require_causal(loaded, prompt, lambda _: None)
    with observe_attention(loaded.model, observer), images_explained(loaded, prompt):
        loaded.model(input_ids=ids, use_cache=False, **prompt.inputs.for_tokens(len(prompt.ids)))
    forget_positions(loaded.model)


@contextmanager
def images_explained(loaded: Loaded, prompt: Prompt) -> Iterator[None]:
    """Turn the error of a model that cannot read the images of a prompt into a `ModelError`."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if prompt.inputs is None or is_out_of_memory(error):
            raise
        raise ModelError(
            f"{loaded.name} fails on the images of prompt {prompt.source.place}: {first_line(error)}",
            "Place them as its chat template does (--chat), and check that its processor and weights belong together.",
        ) from error


def require_causal(loaded: Loaded, prompt: Prompt, observer: Callable[[Call], None]) -> Callable[[Call], None]:
    """Return an observer that passes each call on, after a look at its mask.

    It raises ModelError for a call in which a query sees a later key: a row has weights for the keys up to its query.
    """

    def observe(call: Call) -> None:
        if looks_ahead(call):
            raise ModelError(
                f"{type(loaded.model).__name__} lets the tokens of an image attend to later ones (layer {call.layer}, "
                f"prompt {prompt.source.place}), and a row of a trace ends at its own token",
                "Trace its text prompts, or a model that reads images in order, such as Qwen2.5-VL or Llava.",
            )
        observer(call)

    return observe


def looks_ahead(call: Call) -> bool:
    """Return whether a query of a call sees a key after its own; without a mask none does."""
    if call.mask is None or call.query.shape[2] == 1:
        return False
    count, keys = call.query.shape[2], call.key.shape[2]
    mask = call.mask[..., :keys]
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN_KEY
    return bool(seen.triu(keys - count + 1).any())


def forget_positions(model: nn.Module) -> None:
    """Remove what Qwen-VL and models like it keep of the last prompt: how far images moved the positions of its text.

    They would add it to the positions of the next prompt's new tokens.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            vars(module)["rope_deltas"] = None
