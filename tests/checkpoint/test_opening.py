"""What a name leads to is opened, or refused by what it is; naming styles are told by keys."""

import json

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.checkpoint import locate
from fluxfast.checkpoint.keys import COMFY_PREFIX
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.reader import CheckpointError


@pytest.mark.parametrize("size", [0, 5, 100, 50_000, -1])
def test_truncated_file_is_named(bfl_file, size):
    path = bfl_file()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"flux\.safetensors: not a whole safetensors file"):
        FluxTransformer.from_single_file(path)


@pytest.mark.parametrize(
    "name", ["flux1-dev.sft", "flux1-dev.safetensor", "flux1-dev.bin", "flux1-dev", "flux1.dev-v2"]
)
def test_any_ending(bfl_file, bfl_state, tmp_path, monkeypatch, name):
    """A file is what its content says, under whatever name; the hub is never asked."""
    bfl_file(name=name)
    monkeypatch.setattr(
        locate, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked")
    )
    monkeypatch.chdir(tmp_path)
    for load in (FluxTransformer.from_single_file, FluxTransformer.from_pretrained):
        weight = load(name).transformer_blocks[0].attn.to_out[0].weight
        assert torch.equal(weight, bfl_state["double_blocks.0.img_attn.proj.weight"])
    assert open_checkpoint(name).style == "bfl"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02}q\x00." * 10)
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)) * 10)
    for name, message in (
        ("model.ckpt", "pickle"),
        ("noise.safetensors", "not a whole"),
        ("absent.safetensors", "no such"),
    ):
        with pytest.raises(CheckpointError, match=message):
            FluxTransformer.from_single_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="a folder, expected one file"):
        FluxTransformer.from_single_file(tmp_path)


def test_a_part_alone(folder):
    """One of several parts is refused whether its name says that it is one or not."""
    part = sorted(folder.glob("*.safetensors"))[1]
    with pytest.raises(
        CheckpointError,
        match=rf"one of \d+ parts of a sharded checkpoint: name the folder .*{folder.name}",
    ):
        FluxTransformer.from_single_file(part)
    with pytest.raises(
        CheckpointError, match=r"part\.safetensors: .* part of a sharded checkpoint"
    ):
        FluxTransformer.from_single_file(part.rename(folder / "part.safetensors"))


@pytest.mark.parametrize("style", ["bfl", "comfy", "diffusers"])
@pytest.mark.parametrize(
    ("times", "kind"), [(6, "FLUX.1 Fill"), (2, "FLUX.1 Canny, Depth"), (3, "something else")]
)
def test_more_input_channels(bfl_file, bfl_state, folder, tmp_path, style, times, kind):
    """Fill and the control models as a base: in a file of each style, and in a folder."""
    name = "x_embedder.weight" if style == "diffusers" else "img_in.weight"
    if style == "diffusers":
        bfl_state = FluxTransformer.from_single_file(bfl_file()).state_dict()
    state = bfl_state | {name: torch.cat([bfl_state[name]] * 4 * times, 1)}
    if style == "comfy":
        state = {COMFY_PREFIX + key: tensor for key, tensor in state.items()}
    path = bfl_file(state, "base.sft")
    message = (
        rf"base\.sft: {64 * times} input channels: .*{kind}.*take flux1-dev\.safetensors \(64 "
        r"channels\)"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path, in_channels=64)
    # such a model does work, in its own pipeline
    assert open_checkpoint(path).config["in_channels"] == 64 * times

    config = json.loads((folder / "config.json").read_text()) | {
        "in_channels": 64 * times,
        "out_channels": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=rf"config\.json: {64 * times} input channels: .*{kind}"
    ):
        open_checkpoint(folder.parent, subfolder="transformer", in_channels=64)


def test_folders_of_other_programs(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "quantised by bitsandbytes",
        ),
        ({"quantization_config": {}}, "quantised by another program"),
        ({"_class_name": "ChromaTransformer2DModel"}, "describes ChromaTransformer2DModel"),
        ({"attention_head_dim": "many"}, "no FLUX.1 transformer has such a config"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            FluxTransformer.from_pretrained(folder)


def test_where_a_folders_transformer_is_looked_for(folder):
    pipeline = folder.parent
    for name, subfolder in (
        (pipeline, None),
        (pipeline, "transformer"),
        (folder, None),
        (folder, "transformer"),
    ):
        assert open_checkpoint(name, subfolder=subfolder).where == str(folder)
    with pytest.raises(CheckpointError, match=r"vae/config\.json: no such file"):
        open_checkpoint(pipeline, subfolder="vae")


def test_a_repository(folder, monkeypatch):
    """Of one that can't be trained only its config is downloaded."""
    asked = []

    def download(repository, *, allow_patterns, **hub):
        assert repository == "someone/FLUX.1-Fill-dev" and hub == {"revision": "main"}
        asked.append([pattern for pattern in allow_patterns if "safetensors" in pattern])
        return str(folder.parent)

    monkeypatch.setattr(locate, "snapshot_download", download)
    options = {"subfolder": "transformer", "revision": "main"}
    assert open_checkpoint("someone/FLUX.1-Fill-dev", **options).where == str(folder)
    assert asked == [[], ["transformer/diffusion_pytorch_model**.safetensors"]]
    with pytest.raises(CheckpointError, match="16 input channels"):
        open_checkpoint("someone/FLUX.1-Fill-dev", **options, in_channels=64)
    assert asked[2:] == [[]]


def test_config_and_arguments(bfl_file, tmp_path, folder):
    config = dict(FluxTransformer.from_single_file(bfl_file()).config) | {
        "axes_dims_rope": [8, 12, 12]
    }
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if not k.startswith("_")})
    )
    for given in (tmp_path, tmp_path / "config.json", {**config}):
        assert list(
            FluxTransformer.from_single_file(bfl_file(), config=given).config.axes_dims_rope
        ) == [8, 12, 12]
    with pytest.raises(CheckpointError, match=r"missing: double_blocks\.1"):
        FluxTransformer.from_single_file(bfl_file(), config=config | {"num_layers": 2})
    with pytest.raises(TypeError, match="device_map"):
        FluxTransformer.from_pretrained(folder, device_map="auto")


def test_incomplete_folders(folder, tmp_path):
    def refused(message, path=folder, **kwargs):
        with pytest.raises(CheckpointError, match=message):
            FluxTransformer.from_pretrained(path, **kwargs)

    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    refused(f"{shards[1].name}: not a whole safetensors file")
    shards[1].unlink()
    refused(f"{shards[1].name}: no such file")
    shards[1].write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_single_layers": 2}))
    refused("missing: single_transformer_blocks.1")
    (folder / "config.json").write_text(json.dumps(config | {"num_single_layers": 0}))
    refused("unexpected: single_transformer_blocks.0")
    (folder / "config.json").write_text(
        json.dumps(config | {"_class_name": "SD3Transformer2DModel"})
    )
    refused("describes SD3Transformer2DModel")
    (folder / "config.json").write_text("{")
    refused("config.json: not valid JSON")
    (folder / "config.json").write_text(json.dumps(config))
    index.unlink()
    refused("neither")
    (tmp_path / "model_index.json").write_text("{}")
    refused("subfolder='transformer'", path=tmp_path)
