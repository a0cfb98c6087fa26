"""Embeddings and latents are diffusers' own; model folders are found and told apart."""

import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from fluxfast.data.cache import TensorCache
from fluxfast.data.encoders import LatentEncoder, TextEncoders
from fluxfast.data.model_folders import identity, local_folder

CAPTIONS = ["a photo of a cat", "", "a much longer caption, with 42 words. or so!"]


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(pipeline_folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(pipeline_folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(pipeline_folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(pipeline_folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(pipeline_folder / "tokenizer_2"),
        transformer=None,
    )


def source(folder, part=None):
    return (str(folder), part, None)


@pytest.mark.parametrize("max_length", [512, 20])
def test_embeddings_are_the_flux_pipelines(pipeline, pipeline_folder, max_length):
    encoders = TextEncoders.from_pretrained(source(pipeline_folder), max_length=max_length)
    ours = encoders.encode(CAPTIONS)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, max_sequence_length=max_length)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    # distinct captions must have distinct tokens, or the equality above would say little
    assert (ours["prompt_embeds"][0] - ours["prompt_embeds"][2]).abs().max() > 0.1
    assert (ours["pooled_prompt_embeds"][0] - ours["pooled_prompt_embeds"][2]).abs().max() > 1e-3


def test_attention_mask_counts_tokens_and_zero_padding_uses_it(pipeline_folder):
    plain = TextEncoders.from_pretrained(source(pipeline_folder), max_length=64).encode(CAPTIONS)
    zeroed = TextEncoders.from_pretrained(
        source(pipeline_folder), max_length=64, t5_padding="zero"
    ).encode(CAPTIONS)
    mask = plain["attention_mask"]
    # one token a character of this vocabulary, one a word for its space, one for the end; nothing
    # but the end for ""
    assert mask.sum(1).tolist()[:2] == [len("aphotoofacat") + 5 + 1, 1]
    assert mask.dtype == torch.bool
    assert torch.equal(zeroed["prompt_embeds"], plain["prompt_embeds"] * mask[..., None])
    assert plain["prompt_embeds"][~mask].abs().max() > 0


def test_a_caption_too_long_for_t5_is_cut_with_a_warning(pipeline_folder, caplog):
    encoders = TextEncoders.from_pretrained(source(pipeline_folder), max_length=16)
    short, long = (
        encoders.encode(["tiny"]),
        encoders.encode(["a caption of more than sixteen letters"]),
    )
    assert short["prompt_embeds"].shape == long["prompt_embeds"].shape
    assert len(caplog.records) == 1
    assert "cut to 16: a caption of more" in caplog.text


def test_latents_are_the_normalised_posterior_sample(pipeline, pipeline_folder):
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = LatentEncoder.from_pretrained(source(pipeline_folder, "vae")).encode(images, [3, 4])
    for i, seed in enumerate([3, 4]):
        with torch.no_grad():
            sample = pipeline.vae.encode(images[i : i + 1]).latent_dist.sample(
                torch.Generator().manual_seed(seed)
            )
        expected = (sample - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        assert torch.equal(ours[i : i + 1], expected.to(torch.bfloat16))
    assert ours.shape == (2, 16, 8, 16)
    assert ours.dtype == torch.bfloat16


def test_latents_do_not_depend_on_the_batch(pipeline_folder):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoder = LatentEncoder.from_pretrained(source(pipeline_folder, "vae"))
    batch = encoder.encode(images, [5, 6, 7])
    assert torch.equal(encoder.encode(images[1:2], [6]), batch[1:2])
    assert not torch.equal(encoder.encode(images[1:2], [8]), batch[1:2])


def test_tiling_and_slicing_reach_the_vae(pipeline_folder):
    vae = LatentEncoder.from_pretrained(
        source(pipeline_folder, "vae"), tiling=True, slicing=True
    ).vae
    assert vae.use_tiling
    assert vae.use_slicing


def test_a_vae_in_the_root_of_its_folder_is_found(pipeline_folder):
    assert local_folder(source(pipeline_folder / "vae", "vae")) == pipeline_folder / "vae"


def test_t5_from_elsewhere(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder / "text_encoder_2", tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    save_file(
        {name: weight * 0.5 for name, weight in weights.items()},
        tmp_path / "t5" / "model.safetensors",
        {"format": "pt"},
    )
    pipeline = source(pipeline_folder)
    ours = TextEncoders.from_pretrained(pipeline, max_length=8).encode(["cat"])
    other = TextEncoders.from_pretrained(
        pipeline, t5_source=source(tmp_path / "t5"), max_length=8
    ).encode(["cat"])
    assert torch.equal(ours["pooled_prompt_embeds"], other["pooled_prompt_embeds"])
    assert not torch.allclose(ours["prompt_embeds"], other["prompt_embeds"], atol=0.1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("plainname", "no such folder"),
        ("./a/b", "no such folder"),
    ],
)
def test_a_source_that_does_not_exist_is_named(path, message):
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        local_folder((path, "vae", None))


def test_a_repository_that_cannot_be_reached_is_named(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("fluxfast.data.model_folders.snapshot_download", offline)
    with pytest.raises(
        ValueError,
        match=r"(?s)someone/model at revision 'v1'.*can't be downloaded.*offline.*hf auth login",
    ):
        local_folder(("someone/model", "vae", "v1"))


def test_a_downloaded_repository_is_used_without_the_network(pipeline_folder, monkeypatch):
    calls = []

    def downloaded(repository, *, local_files_only=False, **_):
        calls.append(local_files_only)
        return str(pipeline_folder)

    monkeypatch.setattr("fluxfast.data.model_folders.snapshot_download", downloaded)
    assert local_folder(("someone/model", "vae", None)) == pipeline_folder / "vae"
    assert calls == [True]


def test_a_half_downloaded_repository_is_completed(pipeline_folder, tmp_path, monkeypatch):
    (tmp_path / "half" / "vae").mkdir(parents=True)
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    (tmp_path / "half" / "vae" / "model.safetensors.index.json").write_text(index)

    def download(repository, *, local_files_only=False, **_):
        return str(tmp_path / "half" if local_files_only else pipeline_folder)

    monkeypatch.setattr("fluxfast.data.model_folders.snapshot_download", download)
    assert local_folder(("someone/model", "vae", None)) == pipeline_folder / "vae"


def test_a_pipeline_without_the_part_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no folder 'vae'"):
        local_folder(source(tmp_path, "vae"))


@pytest.mark.parametrize("damage", ["missing weight", "truncated file", "no file", "no config"])
def test_damaged_weights_are_refused_by_name(pipeline_folder, tmp_path, damage):
    folder = shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    if damage == "missing weight":
        weights = load_file(file)
        del weights["encoder.conv_in.weight"]
        save_file(weights, file, {"format": "pt"})
    elif damage == "truncated file":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "no file":
        file.unlink()
    else:
        (folder / "config.json").unlink()
    expected = (
        "encoder.conv_in.weight"
        if damage == "missing weight"
        else "can't be loaded as AutoencoderKL"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        LatentEncoder.from_pretrained(source(tmp_path, "vae"))
    assert str(folder) in str(caught.value)


def test_identity_follows_content_not_place_or_time(pipeline_folder, tmp_path):
    cache = TensorCache(tmp_path / "cache")
    folder = shutil.copytree(pipeline_folder / "vae", tmp_path / "vae")
    before = identity(pipeline_folder / "vae", cache)
    os.utime(folder / "config.json")
    assert identity(folder, cache) == before
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1
    save_file(weights, file, {"format": "pt"})
    assert identity(folder, cache) != before


def test_identity_reads_weights_once(pipeline_folder, tmp_path, monkeypatch):
    cache = TensorCache(tmp_path / "cache")
    before = identity(pipeline_folder / "vae", cache)
    monkeypatch.setattr(
        "fluxfast.data.model_folders.file_hash", lambda path: pytest.fail(f"{path} is read again")
    )
    assert identity(pipeline_folder / "vae", cache) == before


def test_identity_takes_the_hubs_word_for_a_hash(tmp_path, monkeypatch):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blobs / ("ab" * 32))
    monkeypatch.setattr(
        "fluxfast.data.model_folders.file_hash", lambda path: pytest.fail(f"{path} is read")
    )
    identity(tmp_path / "snapshot", TensorCache(tmp_path / "cache"))
