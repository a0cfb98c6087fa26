"""Previews of validation images while they are drawn."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image
from rich.console import Console

from fluxfast.train.previews import Denoised, Drawing, Previewer, decode, previewer_of
from fluxfast.train.run_events import RunEvents

DRAW = {
    "validation_disable": False, "validation_prompt": "a red cup", "validation_resolution": "64x96",
    "validation_num_inference_steps": 5, "validation_guidance": 3.0, "mixed_precision": "no",
    "optimizer": "torch-adamw", "validation_preview": True,
}  # fmt: skip


def tiny_autoencoder(channels=16):
    torch.manual_seed(3)
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture
def drawn(trainer, tmp_path):
    """Draw a run's validation images; returns (image events, what was said, the images' files)."""

    def draw(step=0, **settings):
        made, said, events = trainer(**DRAW | settings), [], []
        announced = RunEvents(tmp_path, said.append)
        announced.subscribe(events.append)
        validator = made.parts.validator
        validator.previewer = previewer_of(
            made.config, made.device, validator.folder, announced, said.append
        )
        validator.run(step, Console(quiet=True))
        files = sorted(validator.folder.glob("step_*"))
        return events, said, files

    return draw


@pytest.mark.parametrize("size", [(16, 16), (48, 16), (64, 96)])
def test_decoding_is_the_autoencoders(size):
    vae = tiny_autoencoder()
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    latents = torch.randn(1, 16, size[1] // 8, size[0] // 8)
    packed = FluxPipeline._pack_latents(latents, 1, 16, *latents.shape[2:])
    image = decode(vae, packed, size)
    with torch.no_grad():
        pixels = vae.decode(latents / 0.5 + 0.25).sample[0].clamp(-1, 1) / 2 + 0.5
    read = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # a level of 256, which rounding may put on either side
    torch.testing.assert_close(read / 255, pixels, atol=0.51 / 255, rtol=0)


def test_the_prediction_is_where_a_straight_flow_ends():
    torch.manual_seed(0)
    image, noise = torch.randn(2, 1, 24, 64, dtype=torch.float64).float()
    for sigma in (0.0, 0.3, 1.0):
        latents, sigma = (1 - sigma) * image + sigma * noise, torch.tensor(sigma)
        denoised = Denoised(0, torch.tensor(500.0), latents, noise - image, sigma)
        # three roundings of fp32 on numbers up to about 5
        torch.testing.assert_close(denoised.predicted, image, atol=5e-6, rtol=0)


def test_each_step_is_previewed(drawn, model):
    events, said, _ = drawn(validation_preview_model=str(model))
    assert not said and len(events) == 5
    for number, event in enumerate(events, 1):
        data = event.content["data"]
        assert event.type == "validation.image" and len(event.images) == 1
        assert event.content["title"] == f"Validation (step {number}/5): validation"
        assert event.text == event.content["title"]
        assert (data["step"], data["step_label"]) == (number, f"{number}/5")
        assert data["resolution"] == "64x96" and data["prompt"] == "a red cup"
        assert data["validation_type"] == "intermediary" and data["global_step"] == 0
        with Image.open(io.BytesIO(event.images[0])) as image:
            assert image.size == (64, 96) and image.format == "PNG"
    timesteps = [event.content["data"]["timestep"] for event in events]
    assert timesteps == sorted(timesteps, reverse=True) and 999 < timesteps[0] <= 1000


@pytest.mark.parametrize(("every", "steps"), [(2, [1, 2, 4]), (5, [1, 5]), (7, [1])])
def test_some_steps_are_previewed(drawn, model, every, steps):
    events, _, _ = drawn(validation_preview_model=str(model), validation_preview_steps=every)
    assert [event.content["data"]["step"] for event in events] == steps


def test_the_newest_preview_of_each_prompt_is_a_file(drawn, model, tmp_path):
    library = tmp_path / "library.json"
    library.write_text('{"a/b": "a blue cup"}')
    events, _, files = drawn(validation_preview_model=str(model), user_prompt_library=str(library))
    folder = files[0].parent
    assert (folder / "preview_validation.png").read_bytes() == events[4].images[0]
    (other,) = folder.glob("preview_a_b*.png")
    assert other.read_bytes() == events[9].images[0]
    assert len(list(folder.glob("preview_*"))) == 2


def test_the_last_preview_is_the_drawn_image(trainer, tmp_path):
    made = trainer(**{**DRAW, "validation_preview": False}, validation_guidance_real=2.0)
    validator, shown = made.parts.validator, []

    class Watch(Previewer):
        def show(self, drawing, denoised):
            shown.append((drawing, denoised))

    events = RunEvents(tmp_path, print)
    validator.previewer = Watch(
        tiny_autoencoder, folder=tmp_path, every=1, events=events, say=print
    )
    validator.run(0, Console(quiet=True))
    assert shown[0][0] == Drawing("validation", "a red cup", (64, 96), 0, 5)
    last = shown[-1][1]
    assert len(shown) == 5 and float(last.sigma) == 0
    assert torch.equal(last.predicted, last.latents.float())
    # a step goes along the prediction, classifier-free guidance included
    for (_, before), (_, after) in pairwise(shown):
        moved = before.latents + (after.sigma - before.sigma) * after.velocity
        torch.testing.assert_close(after.latents, moved)


def test_images_are_the_same_with_previews_and_without(drawn, model):
    _, _, files = drawn(validation_preview_model=str(model))
    with_previews = [path.read_bytes() for path in files]
    events, _, files = drawn(validation_preview=False)
    assert not events and [path.read_bytes() for path in files] == with_previews


def broken(what, tmp_path, monkeypatch):
    vae = tiny_autoencoder(4 if what == "another model" else 16)
    vae.save_pretrained(tmp_path / "vae")
    if what == "lost":
        # after the look at the start
        monkeypatch.setattr(AutoencoderTiny, "from_pretrained", lambda *args, **kwargs: 1 / 0)
    if what == "decoding":
        monkeypatch.setattr(AutoencoderTiny, "decode", lambda *args, **kwargs: 1 / 0)
    if what == "disk":
        monkeypatch.setattr("fluxfast.train.previews.write_atomic", lambda *args: 1 / 0)
    return tmp_path / "vae"


@pytest.mark.parametrize("what", ["lost", "another model", "decoding", "disk"])
def test_a_preview_that_fails_is_told_once_and_ends_nothing(drawn, tmp_path, monkeypatch, what):
    events, said, files = drawn(validation_preview_model=str(broken(what, tmp_path, monkeypatch)))
    assert len(files) == 1 and not events
    assert len(said) == 1 and said[0].startswith("previews: ") and "goes on without" in said[0]
