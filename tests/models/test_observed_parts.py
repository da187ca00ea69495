"""Which modules of a model take part in its attention over a text, and which do not."""

from __future__ import annotations

import pytest
import torch

from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.obstacles import obstacle
from tests.models.build import build


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "hunyuan_vl", "evolla", "kosmos-2.5"])
def test_modules_that_are_no_attention_over_the_text_need_no_number(name: str) -> None:
    """Hunyuan leaves its MLPs without a layer number, Evolla its protein encoder, Kosmos-2.5 its image projection."""
    unnumbered = [part for part in build(name).modules() if getattr(part, "layer_idx", 0) is None]
    assert unnumbered and obstacle(build(name)) == ""


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_attention_modules_that_layers_share_are_an_obstacle(name: str) -> None:
    assert obstacle(build(name)).endswith("shares its attention modules between layers")


def test_attention_of_an_image_projection_is_left_alone() -> None:
    """Kosmos-2.5: it shares the configuration, and so the kernel, of the language model, but has no layer number."""
    model = build("kosmos-2.5")
    queries = model.config.latent_query_num
    ids = torch.arange(3, 9 + queries)[None]
    place = ((ids > 3) & (ids <= 3 + queries)).long()
    torch.manual_seed(0)
    patches = torch.rand(1, 9, 2 + model.config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.cartesian_prod(torch.arange(1.0, 4), torch.arange(1.0, 4))
    inputs = {"flattened_patches": patches, "image_embeds_position_mask": place, "use_cache": False}
    calls: list[Call] = []
    with torch.inference_mode():
        expected = model(input_ids=ids, **inputs).logits
        other = model(input_ids=ids, **{**inputs, "flattened_patches": patches / 2}).logits
        with observe_attention(model, calls.append):
            observed = model(input_ids=ids, **inputs).logits
    assert torch.equal(expected, observed) and not torch.equal(expected, other), "the image is read"
    assert [call.layer for call in calls] == [0, 1, 2]
    assert {call.query.shape[2] for call in calls} == {ids.shape[1]}
