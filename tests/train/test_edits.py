"""Validation with reference images, beside diffusers' FluxKontextPipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from PIL import Image
from rich.console import Console
from test_trainer import FP32

from fluxfast.config.settings import ConfigError
from fluxfast.data.images import to_tensor
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import edits
from fluxfast.train.edits import Edit, kontext_size, load_references, reference_tokens, stitched
from fluxfast.train.grid import LABELS
from fluxfast.train.trainer import Trainer
from fluxfast.train.validation import ValidationSettings, Validator

KONTEXT = FP32 | {"model_flavour": "kontext", "validation_disable": None}
DRAWN = {
    "validation_prompt": "a red cat", "validation_resolution": "64x64",
    "validation_num_inference_steps": 1, "validation_step_interval": 0, "max_train_steps": 1,
}  # fmt: skip


@pytest.fixture
def small_sizes(monkeypatch):
    """Kontext's sizes, an eighth as large each way: a tiny VAE takes seconds for a megapixel."""
    small = [(width // 8 // 16 * 16, height // 8 // 16 * 16) for width, height in SIZES]
    monkeypatch.setattr(edits, "PREFERRED_KONTEXT_RESOLUTIONS", small)


SIZES = list(edits.PREFERRED_KONTEXT_RESOLUTIONS)


def test_references_get_the_nearest_of_kontexts_sizes(tmp_path):
    assert len(SIZES) == 17
    assert kontext_size((1000, 1000)) == kontext_size((64, 63)) == (1024, 1024)
    assert kontext_size((1920, 1080)) == (1392, 752)
    assert kontext_size((10, 1000)) == (672, 1568)
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    assert load_references([tmp_path / "wide.png"])[0].size == (1568, 672)


def test_an_edit_is_the_one_of_diffusers_pipeline(workspace, small_sizes, tmp_path):
    """With one reference, in fp32, on the tiny pipeline: the latents that come out."""
    transformer = FluxTransformer.from_pretrained(workspace / "pipeline", subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(workspace / "pipeline", subfolder="vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        workspace / "pipeline", subfolder="scheduler"
    )
    torch.manual_seed(0)
    embeds = {
        "prompt_embeds": torch.randn(1, 9, transformer.config.joint_attention_dim),
        "pooled_prompt_embeds": torch.randn(1, transformer.config.pooled_projection_dim),
    }
    photo = next((workspace / "images").glob("*.png"))
    (reference,) = load_references([photo])
    pipeline = FluxKontextPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=to_tensor(reference)[None], _auto_resize=False, **embeds, height=96, width=64,
        max_area=96 * 64, num_inference_steps=3, guidance_scale=2.5,
        generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip

    settings = ValidationSettings(
        prompts={"edit": Edit("x", (photo,))}, negative_prompt="", resolutions=[(64, 96)], steps=3,
        guidance=2.5, guidance_real=1.0, seed=5, images_per_prompt=1, beside_base=False,
        references_at="right",
    )  # fmt: skip
    validator = Validator(
        settings, output_dir=tmp_path, transformer=transformer, scheduler=scheduler,
        load_vae=lambda: vae, embeds=lambda prompt: embeds, dtype=torch.float32,
    )  # fmt: skip
    (drawn,) = validator.run(7, Console(quiet=True))
    path = drawn.path
    with Image.open(path) as image:
        drawn = image.crop((0, 0, 64, 96))
        assert image.size == (64 + 96, 96)
    # a few last bits of fp32 are a level of 255 at most
    difference = (to_tensor(drawn) - to_tensor(expected)).abs().max() * 127.5
    assert difference <= 1
    assert not transformer._forward_pre_hooks
    plain = Validator(
        ValidationSettings(**{**vars(settings), "prompts": {"edit": Edit("x", ())}}),
        output_dir=tmp_path, transformer=transformer, scheduler=scheduler, load_vae=lambda: vae,
        embeds=lambda prompt: embeds, dtype=torch.float32,
    )  # fmt: skip
    with Image.open(plain.run(8, Console(quiet=True))[0].path) as image:
        assert image.size == (64, 96)
        assert (to_tensor(image) - to_tensor(expected)).abs().max() * 127.5 > 5


def test_latents_of_references_are_shifted_and_scaled(workspace):
    vae = AutoencoderKL.from_pretrained(workspace / "pipeline", subfolder="vae")
    images = [Image.new("RGB", size, "teal") for size in ((64, 32), (32, 64))]
    tokens, ids = reference_tokens(vae, images)
    assert tokens.shape == (1, 8 + 8, 64) and ids.shape == (16, 3)
    mean = vae.encode(to_tensor(images[1])[None]).latent_dist.mean
    expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(tokens[0, 8, ::4], expected[0, :, 0, 0])


@pytest.fixture
def others(workspace, tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    for path in (workspace / "images").glob("*.png"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / path.name)
    return [
        {
            "id": "before", "type": "local", "conditioning_type": "reference_strict",
            "source_dataset_id": "photos", "instance_data_dir": str(folder),
            "cache_dir_vae": str(tmp_path / "cache" / "before"),
        }
    ]  # fmt: skip


def drawn(output):
    folder = output.parent / "validation_images"
    found = {}
    for path in sorted(folder.glob("step_000001_*.png")):
        with Image.open(path) as image:
            found[path.name] = image.size
    return found


def test_a_run_draws_prompts_with_their_references_and_samples_of_its_datasets(
    run, workspace, others, small_sizes, tmp_path
):
    photo = str(next((workspace / "images").glob("*.png")))
    file = tmp_path / "references.json"
    file.write_text(json.dumps({"validation": [photo, photo]}))
    lora, _ = run(**KONTEXT | DRAWN, others=others, num_eval_images=2, validation_input=str(file))
    found = drawn(lora)
    assert len(found) == 3
    # the base's image with its references at its left, and the one of now at the right of both
    assert found["step_000001_validation_0_64x64.png"] == (4 * 64, LABELS + 64)
    samples = [name for name in found if "photos_" in name]
    assert len(samples) == 2 and {found[name] for name in samples} == {(3 * 64, LABELS + 64)}
    again, _ = run(**KONTEXT | DRAWN, others=others, num_eval_images=2, name="again")
    assert [name for name in drawn(again) if "photos_" in name] == samples


def test_a_reference_that_vanishes_ends_no_run(run, others, small_sizes, monkeypatch, tmp_path):
    changes = {"validation_step_interval": 1, "max_train_steps": 2, "num_eval_images": 1}
    step = Trainer.train_step

    def removing(self, number):
        for path in (tmp_path / "before").glob("*.png"):
            path.unlink()
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", removing)
    lora, out = run(**KONTEXT | DRAWN | changes, others=others)
    assert lora.is_file() and "is not drawn" in out.getvalue()
    assert [path.name for path in (lora.parent / "validation_images").glob("step_000002_*")] == [
        "step_000002_validation_0_64x64.png"
    ]


@pytest.mark.parametrize(
    "left_out", [{"validation_using_datasets": False}, {"dataset": {"disable_validation": True}}]
)
def test_datasets_may_be_left_out(run, others, small_sizes, left_out):
    lora, _ = run(**KONTEXT | DRAWN | left_out, others=others)
    assert [*drawn(lora)] == ["step_000001_validation_0_64x64.png"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"eval_dataset_id": "photo"},
            ['"eval_dataset_id" names "photo"', 'did you mean "photos"'],
        ),
        ({"eval_dataset_id": ["photos", "x"]}, ['names "x"']),
        ({"validation_input": {"cat": "a.png"}}, ['"cat"', "nickname of no prompt"]),
        ({"validation_input": {"validation": "gone.png"}}, ["gone.png: no such file"]),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_loaded(run, others, changes, parts):
    with pytest.raises(ConfigError) as raised:
        run(**KONTEXT | DRAWN | changes, others=others)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_references_and_flavour_must_agree(run, others):
    with pytest.raises(
        ConfigError, match=r'"photos" without references, which "model_flavour" kon'
    ):
        run(**FP32 | {"model_flavour": "kontext"})


def test_stitching():
    image, reference = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (10, 20), "blue")
    left, right = (stitched(image, [reference], where) for where in ("left", "right"))
    assert left.size == right.size == (25, 10)
    assert left.getpixel((2, 5)) == right.getpixel((22, 5)) == (0, 0, 255)
    assert left.getpixel((10, 5)) == right.getpixel((10, 5)) == (255, 0, 0)
