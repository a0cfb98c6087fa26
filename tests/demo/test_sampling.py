"""Drawing many prompts at once: each as it would be drawn alone."""

import numpy as np
import pytest
import torch

import fluxfast
from fluxfast.demo.pipeline import BASE_CONFIG, make_pipeline
from fluxfast.demo.sampling import Sampler

# of eleven and twelve tokens, in turn
PROMPTS = [
    "a red cat on a beach by day, clear sky",
    "a red cat on a beach by day, cloudy",
    "a blue car in a city at night, clear sky",
    "a blue car in a city at night, rain",
]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, BASE_CONFIG | {"num_layers": 1, "num_single_layers": 1})
    return Sampler(folder)


@pytest.fixture
def texts(sampler):
    """The lengths of the texts that the transformer sees while a test draws."""
    seen = []
    hook = sampler.transformer.context_embedder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    yield seen
    hook.remove()


def levels(image):
    return np.asarray(image, int)


def test_prompts_of_several_lengths_are_drawn_as_each_alone(sampler):
    together = sampler.draw(PROMPTS, size=64, steps=2, seed=5)
    for place, (prompt, image) in enumerate(zip(PROMPTS, together, strict=True)):
        (alone,) = sampler.draw([prompt], size=64, steps=2, seed=5 + place)
        # a batch's sums round otherwise
        assert np.abs(levels(alone) - levels(image)).max() <= 1
        assert image.size == (64, 64)
    assert np.abs(levels(together[0]) - levels(together[2])).mean() > 1


def test_drawing_is_told_in_parts_that_add_up_to_the_images(sampler):
    parts = []
    sampler.draw(PROMPTS, size=64, steps=2, drawn=parts.append)
    assert len(parts) == 4 and sum(parts) == pytest.approx(len(PROMPTS))


def test_the_model_sees_no_padding(sampler, texts):
    sampler.draw(PROMPTS, size=64, steps=1, guidance_real=1.0)
    assert sorted(texts) == sorted({len_of(sampler, prompt) for prompt in PROMPTS})


def test_guidance_goes_from_the_empty_prompt_through_the_prompt(sampler, texts):
    """v = empty + 3 · (prompt - empty), which one Euler step makes an image of."""
    drawn = sampler.draw(PROMPTS[:1], size=64, steps=1, guidance_real=3.0)
    empty = len_of(sampler, "")
    assert set(texts) == {len_of(sampler, PROMPTS[0]), empty} and empty < 3
    alone = [
        sampler.draw([prompt], size=64, steps=1, guidance_real=1.0) for prompt in (PROMPTS[0], "")
    ]
    # far from linear in pixels, but on the other side of the prompt's own image
    guided, own, without = (levels(images[0]).astype(float) for images in (drawn, *alone))
    assert np.sum((guided - own) * (own - without)) > 0


def test_half_precision_draws_the_same_pictures(sampler):
    half = Sampler(sampler.folder, dtype=torch.bfloat16)
    for image, other in zip(
        sampler.draw(PROMPTS, size=64, steps=2), half.draw(PROMPTS, size=64, steps=2), strict=True
    ):
        assert np.abs(levels(image) - levels(other)).mean() < 3


def test_a_lora_changes_what_is_drawn(sampler, tmp_path):
    transformer = fluxfast.FluxTransformer.from_pretrained(sampler.folder, subfolder="transformer")
    fluxfast.add_lora(transformer, targets="all", rank=2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.fill_(2.0)
    lora = fluxfast.save_lora(transformer, tmp_path / "lora")
    (base,) = sampler.draw(PROMPTS[:1], size=64, steps=2)
    (changed,) = Sampler(sampler.folder, lora=lora).draw(PROMPTS[:1], size=64, steps=2)
    assert np.abs(levels(base) - levels(changed)).max() > 10


def len_of(sampler, prompt):
    return int(sampler.text.encode([prompt])["attention_mask"].sum())
