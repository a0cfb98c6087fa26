"""Runs with masks, segmentations and regularisation data, with and without TREAD."""

import json

import numpy as np
import pytest
import torch
from kill_cases import Killed, kill_at, same_files
from PIL import Image
from test_lycoris_run import LOKR, OTHERS
from test_trainer import BF16, FP32, TREAD

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import flow, preflight
from fluxfast.train.events import read_metrics


@pytest.fixture
def masks(workspace, tmp_path):
    """A white square at the top left of each image; returns the entry of such a dataset."""

    def write(kind="mask", extent=0.5):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        for path in (workspace / "images").glob("*.png"):
            with Image.open(path) as image:
                width, height = image.size
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[: int(height * extent), : int(width * extent)] = 255
            Image.fromarray(pixels).save(folder / path.name)
        return {
            "id": kind,
            "type": "local",
            "dataset_type": "conditioning",
            "conditioning_type": kind,
            "source_dataset_id": "photos",
            "instance_data_dir": str(folder),
            "cache_dir_vae": str(tmp_path / "cache" / kind),
        }

    return write


@pytest.mark.parametrize("mode", [BF16 | TREAD, FP32], ids=["bf16-tread", "fp32"])
@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_a_masked_run_trains_and_resumes_to_the_same_bits(run, masks, monkeypatch, kind, mode):
    mode = mode | {"others": [masks(kind)], "masked_loss_probability": 0.5}
    whole, _ = run(name="whole", **mode)
    plain, _ = run(name="plain", **{**mode, "others": []})
    assert not same_files(whole, plain)
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        run(name="killed", **mode)
    killed, _ = run(name="killed", **mode)
    assert same_files(whole, killed)


def examples(trainer, number=2):
    """Batches of a run as its steps see them, and the first of them."""
    trainer.batches = trainer.data.loader(0, trainer.objective.example)
    found = [next(trainer.batches) for _ in range(number)]
    trainer.batches.close()
    return found


def fill(transformer):
    """Give every trained weight a value, so that the adapter has an effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_the_masked_loss_is_the_squared_error_times_the_mask(trainer, masks):
    """By hand, in fp64, on the unpacked latents; the mean is over all of them."""
    made = trainer(**FP32, others=[masks()])
    fill(made.transformer)
    (example, _) = examples(made)
    value = made.objective.loss(example)
    inputs = made.objective._model_inputs(example)
    with torch.no_grad():
        prediction = made.transformer(**inputs, return_dict=False)[0]
    weight = flow.pack_latents(
        example.batch.loss_mask.expand(-1, example.batch.latents.shape[1], -1, -1)
    )
    assert 0.2 < weight.mean() < 0.3
    error = (prediction.double() - example.target.double()) ** 2 * weight.double()
    # fp32 sums over 2 · 16 · 64 numbers
    assert value.item() == pytest.approx(error.mean().item(), rel=1e-5)


def test_tread_keeps_what_the_mask_keeps(trainer, masks, monkeypatch):
    made = trainer(**FP32, **TREAD, others=[masks(extent=0.8)])
    seen = []
    router = made.transformer.router
    draw = type(router).draw

    def watch(self, batch, tokens, ratio, force_keep, device):
        index = draw(self, batch, tokens, ratio, force_keep, device)
        seen.append((force_keep, index))
        return index

    monkeypatch.setattr(type(router), "draw", watch)
    made.transformer.train()
    for example in examples(made):
        made.objective.loss(example)
    for forced, index in seen:
        # 0.8 of each side: more than the half that the route would keep
        assert index.shape[1] == forced.sum(dim=1).max() > 8
        for sample, kept in zip(forced, index, strict=True):
            assert {*sample.nonzero().flatten().tolist()} <= {*kept.tolist()}


KINDS = {
    "standard": {},
    "dora": {"use_dora": True, "lora_dropout": 0.0},
    "lokr": LOKR,
    **OTHERS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_regularisation_data_is_trained_towards_the_bases_own_prediction(
    trainer, workspace, tmp_path, kind
):
    """The target is the base's prediction, not the adapter's, and gradients reach the adapter."""
    settings = dict(KINDS[kind])
    if "apply_preset" in settings or kind in OTHERS:
        file = tmp_path / "lycoris.json"
        file.write_text(json.dumps(LOKR | settings))
        settings = {"lora_type": "lycoris", "lycoris_config": str(file)}
    made = trainer(**FP32 | settings, dataset={"is_regularisation_data": True})
    fill(made.transformer)
    (example, _) = examples(made)
    assert example.batch.is_regularisation_data
    inputs = made.objective._model_inputs(example)
    target = made.objective._base_prediction(inputs)
    base = FluxTransformer.from_pretrained(workspace / "pipeline", subfolder="transformer")
    with torch.no_grad():
        expected = base(**inputs, return_dict=False)[0]
        own = made.transformer.eval()(**inputs, return_dict=False)[0]
    made.transformer.train()
    # the same products in another order of sums
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own, expected, rtol=1e-2, atol=1e-2)
    made.objective.loss(example).backward()
    made.gradients.take()
    made.gradients.hand_over()
    assert any(buffer.any() for buffer in made.gradients.buffers)


def test_its_loss_is_logged_apart(run, workspace, tmp_path):
    texts = {
        "id": "held", "type": "local", "instance_data_dir": str(workspace / "images"),
        "caption_strategy": "filename", "resolution": 64, "resolution_type": "pixel_area",
        "crop": True, "crop_style": "center", "repeats": 20, "is_regularization_data": True,
        "cache_dir_vae": str(tmp_path / "held"),
    }  # fmt: skip
    lora, _ = run(**FP32, others=[texts], max_train_steps=10)
    lines = read_metrics(lora.parent / "metrics.jsonl")
    assert {line["dataset"] for line in lines} == {"photos", "held"}
    for line in lines:
        held = line.get("regularisation_loss")
        assert (held is not None) == (line["dataset"] == "held")
        # the step has one batch
        assert held is None or held == pytest.approx(line["loss"], rel=1e-6)


def test_references_are_refused_where_the_flavour_sees_none(write_config, masks):
    entry = masks() | {"conditioning_type": "reference_strict"}
    with pytest.raises(
        ConfigError, match=r'"mask" holds references .* "model_flavour" dev does not'
    ):
        preflight.check(load_config(write_config(**FP32, others=[entry])), torch.device("cpu"))
