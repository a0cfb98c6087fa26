"""A run of each flavour on the tiny pipeline; masks on T5's padding; guidance at validation."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from kill_cases import Killed, kill_at, same_files
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from test_trainer import BF16, FP32, TREAD

from fluxfast.config.flavours import FLAVOURS
from fluxfast.data.images import to_tensor
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow
from fluxfast.train.drawing import guided_after
from fluxfast.train.edits import Edit
from fluxfast.train.events import read_metrics
from fluxfast.train.objective import Objective
from fluxfast.train.validation import ValidationSettings, Validator

MASKED = {"flux_attention_masked_training": True}


@pytest.mark.parametrize("flavour", [name for name in FLAVOURS if name != "kontext"])
def test_a_run_of_each_flavour(run, flavour):
    # schnell's assistant is on the Hub (`test_assistant`)
    few = {"flux_fast_schedule": True, "disable_assistant_lora": True}
    settings = few if FLAVOURS[flavour].few_steps else {}
    lora, _ = run(model_flavour=flavour, max_train_steps=2, **settings)
    assert len(read_metrics(lora.parent / "metrics.jsonl")) == 2
    with safe_open(lora, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == f"flux-{flavour}/lora"


@pytest.mark.parametrize(
    "mode",
    [
        BF16 | TREAD,
        FP32,
        BF16 | {"base_model_precision": "int8-quanto", "modulation_ahead": True},
        FP32 | {"enable_group_offload": True},
        FP32 | {"dataset": {"is_regularisation_data": True, "repeats": 20}},
    ],
    ids=["bf16-tread", "fp32", "int8-ahead", "streamed", "regularisation"],
)
def test_a_masked_run_resumes_to_the_same_bits(run, monkeypatch, mode):
    seen = []
    example = Objective.example

    def watch(self, batch, number):
        made = example(self, batch, number)
        seen.append((made.prompt_embeds.shape[1], batch.attention_mask.sum(1).tolist()))
        return made

    monkeypatch.setattr(Objective, "example", watch)
    whole, _ = run(name="whole", **mode | MASKED)
    assert seen and all(length == max(1, *tokens) for length, tokens in seen)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode | MASKED)
    killed, _ = run(name="killed", **mode | MASKED)
    assert same_files(whole, killed)


def test_libreflux_masks_and_draws_with_guidance(run):
    _, out = run(
        model_flavour="libreflux", max_train_steps=1, flux_attention_masked_training=False,
        validation_guidance_real=1.0, validation_disable=None, validation_prompt="a cat",
        validation_resolution="64x64",
    )  # fmt: skip
    told = " ".join(out.getvalue().split())
    assert '"flux_attention_masked_training" is True instead of False: LibreFlux was' in told
    assert '"validation_guidance_real" is 6.0 instead of 1.0: LibreFlux was trained' in told
    assert "validation_images/grid_step_000001.png" in told


def test_guidance_begins_after_so_many_steps():
    """pred = uncond + g (cond - uncond) from there on, and cond before, which saves a pass."""

    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * 2

    model, g = Counting(), 4.0
    with guided_after(model, 2):
        for step in range(5):
            cond = model(torch.tensor(1.0 + step))
            uncond = model(torch.tensor(0.5))
            expected = cond if step < 2 else 1.0 + g * (cond - 1.0)
            assert uncond + g * (cond - uncond) == expected
    assert model.calls == 5 + 3
    assert "forward" not in vars(model)


# the quickstart's recipe of a fine-tuned transformer without the pipeline's folders
DEV2PRO = {
    "model_family": "flux",
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "pretrained_transformer_model_name_or_path": "ashen0209/Flux-Dev2Pro",
    "pretrained_vae_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "pretrained_transformer_subfolder": "none",
}


@pytest.mark.parametrize("guidance", [{}, {"flux_guidance_value": 3.5}, {
    "flux_guidance_mode": "random-range", "flux_guidance_min": 1.0, "flux_guidance_max": 4.0,
}], ids=["distilled", "cfg-trained", "random-range"])  # fmt: skip
def test_dev2pros_recipe_with_only_its_paths_changed(run, workspace, tmp_path, guidance):
    alone = tmp_path / "dev2pro"
    shutil.copytree(workspace / "pipeline" / "transformer", alone)
    paths = {
        "black-forest-labs/FLUX.1-dev": str(workspace / "pipeline"),
        "ashen0209/Flux-Dev2Pro": str(alone),
    }
    recipe = json.loads(json.dumps(DEV2PRO))
    recipe = {name: paths.get(value, value) for name, value in recipe.items()}
    lora, _ = run(**recipe, **guidance, max_train_steps=2)
    assert len(read_metrics(lora.parent / "metrics.jsonl")) == 2


def test_an_image_of_a_masked_flavour_is_drawn_without_the_padding(workspace, tmp_path):
    """Whatever stands there: beside FluxPipeline on prompts that have none, with guidance."""
    transformer = FluxTransformer.from_pretrained(workspace / "pipeline", subfolder="transformer")
    vae = AutoencoderKL.from_pretrained(workspace / "pipeline", subfolder="vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        workspace / "pipeline", subfolder="scheduler"
    )
    torch.manual_seed(0)
    width, tokens = transformer.config.joint_attention_dim, {"long": 9, "short": 4}
    pooled = torch.randn(1, transformer.config.pooled_projection_dim)
    text = torch.randn(1, 20, width)

    def embeds(prompt):
        return {
            "prompt_embeds": text,
            "pooled_prompt_embeds": pooled,
            "attention_mask": torch.arange(20)[None] < tokens[prompt],
        }

    settings = ValidationSettings(
        prompts={"p": Edit("long", ())}, negative_prompt="short", resolutions=[(64, 64)], steps=2,
        guidance=1.0, guidance_real=3.0, seed=5, images_per_prompt=1, beside_base=False,
        masked_text=True,
    )  # fmt: skip
    validator = Validator(
        settings, output_dir=tmp_path, transformer=transformer, scheduler=scheduler,
        load_vae=lambda: vae, embeds=embeds, dtype=torch.float32,
    )  # fmt: skip
    path = validator.run(1, Console(quiet=True))[0].path
    with Image.open(path) as image:
        drawn = to_tensor(image)

    # by hand, with each prompt's own tokens alone
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    image, ids = flow.pack_latents(latents), flow.image_ids(8, 8)
    sigmas = np.linspace(1.0, 1 / 2, 2)
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(16))
    for t in scheduler.timesteps:
        cond, uncond = (
            transformer(
                hidden_states=image, timestep=t[None] / 1000, img_ids=ids,
                encoder_hidden_states=text[:, :n], txt_ids=torch.zeros(n, 3),
                pooled_projections=pooled, guidance=torch.tensor([1.0]), return_dict=False,
            )[0].detach()
            for n in (9, 4)
        )  # fmt: skip
        image = scheduler.step(uncond + 3.0 * (cond - uncond), t, image, return_dict=False)[0]
    latents = FluxPipeline._unpack_latents(image, 64, 64, 8)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    expected = vae.decode(latents, return_dict=False)[0][0].detach().clamp(-1, 1)
    # a level of 255
    assert (drawn - expected).abs().max() * 127.5 <= 1.01
