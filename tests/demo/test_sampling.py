"""Drawing many prompts at once: each image is what it would be alone."""

import numpy as np
import pytest
import torch

import fluxfast
from fluxfast.demo.pipeline import make_pipeline
from fluxfast.demo.sampling import Sampler

TINY = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
# of two lengths, and one twice
PROMPTS = ("a red cat on a beach by day, rain", "a plonk", "a red cat on a beach by day, rain")
SIZE = {"size": 64, "steps": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, TINY)
    return folder


def difference(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def test_an_image_comes_from_its_prompt_and_its_place(pipeline):
    sampler, told = Sampler(pipeline), []
    together = sampler.draw(PROMPTS, drawn=told.append, **SIZE)
    for place, prompt in enumerate(PROMPTS):
        (alone,) = sampler.draw([prompt], seed=place, **SIZE)
        # other batches add up in another order, which may round a pixel's value to the next
        assert alone.size == (64, 64) and difference(alone, together[place]) <= 1
    assert difference(together[0], together[2]) > 10
    # two steps of each of two batches
    assert sorted(told) == [0.5, 0.5, 1, 1]


def test_a_lora_changes_what_is_drawn(pipeline, tmp_path):
    transformer = fluxfast.FluxTransformer.from_pretrained(pipeline, subfolder="transformer")
    fluxfast.add_lora(transformer, targets="all", rank=2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.fill_(2.0)
    lora = fluxfast.save_lora(transformer, tmp_path / "lora")
    (base,), (changed,) = (
        Sampler(pipeline, lora=each).draw(PROMPTS[:1], **SIZE) for each in (None, lora)
    )
    assert difference(base, changed) > 10
