"""Files that are not what they should be are refused by name; the three layouts are told apart by their keys."""

import json

import pytest
import torch
from bfl_reference import BflFlux
from safetensors.torch import load_file, save_file

from fluxfast import FluxTransformer
from fluxfast.model import layouts
from fluxfast.model.checkpoint import CheckpointError
from support import SMALL

BFL = {"in_channels": 16, "dim": 64, "n_heads": 2, "depth": 1, "depth_single": 2, "context": 24, "pooled": 20}


@pytest.fixture
def bfl_state():
    torch.manual_seed(0)
    return BflFlux(**BFL, axes=(4, 14, 14), guidance=True).state_dict()


@pytest.fixture
def bfl_file(tmp_path, bfl_state):
    def write(state=bfl_state, name="flux.safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def folder(tmp_path):
    config = SMALL | {"num_layers": 1, "num_single_layers": 1}
    FluxTransformer(**config).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    return tmp_path / "transformer"


def test_sizes_are_inferred(bfl_file):
    config = FluxTransformer.from_single_file(bfl_file()).config
    expected = SMALL | {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}
    assert {k: config[k] for k in expected} == expected


def test_bfl_map_covers_the_real_model_exactly():
    """On FLUX.1-dev's shape every one of our tensors has its place, and the packed ones add up to BFL's sizes."""
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in FluxTransformer(guidance_embeds=True).state_dict().items()}
        theirs = BflFlux(
            **{"in_channels": 64, "dim": 3072, "n_heads": 24, "depth": 19, "depth_single": 38, "context": 4096, "pooled": 768},
            axes=(16, 56, 56),
            guidance=True,
        ).state_dict()
    sources = layouts.sources("bfl", ours)
    assert sources.keys() == ours.keys()
    elements = dict.fromkeys(theirs, 0)
    for name, source in sources.items():
        rows = source.rows or (0, theirs[source.key].shape[0])
        assert (rows[1] - rows[0], *theirs[source.key].shape[1:]) == ours[name]
        elements[source.key] += ours[name][0]
    assert elements == {k: v.shape[0] for k, v in theirs.items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.items()}
    assert FluxTransformer.from_config(layouts.infer_config("bfl", shapes, None) | {"num_layers": 0, "num_single_layers": 0})


def test_diffusers_single_file_and_dtype(folder, tmp_path):
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
    save_file(state, tmp_path / "one.safetensors")
    model = FluxTransformer.from_single_file(tmp_path / "one.safetensors", torch_dtype=torch.bfloat16)
    again = FluxTransformer.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b) and torch.equal(a, state[name].bfloat16())
    assert not model.training


def test_fp8_file_loads(bfl_file, bfl_state):
    path = bfl_file({k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in bfl_state.items()})
    weight = FluxTransformer.from_single_file(path, torch_dtype=torch.bfloat16).transformer_blocks[0].attn.to_out[0].weight
    assert torch.equal(weight, bfl_state["double_blocks.0.img_attn.proj.weight"].to(torch.float8_e4m3fn).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("double_blocks.0.txt_attn.proj.bias"), "1 missing: double_blocks.0.txt_attn.proj.bias"),
        (lambda s: s.update({"double_blocks.0.extra": torch.zeros(1)}), "1 unexpected: double_blocks.0.extra"),
        (lambda s: s.update({"txt_in.bias": torch.zeros(63)}), r"txt_in.bias has shape \(63,\), expected \(64,\)"),
        (lambda s: s.pop("img_in.weight"), "tensor img_in.weight is missing"),
        (lambda s: s.update({"double_blocks.0.img_mlp.0.weight": torch.zeros(128, 64)}), "not the proportions of FLUX.1"),
        (lambda s: s.update({"txt_in.bias": torch.zeros(64, dtype=torch.int32)}), "txt_in.bias holds torch.int32"),
        (lambda s: [s.pop(k) for k in list(s) if "blocks" in k], "not a FLUX.1 transformer"),
    ],
)
def test_wrong_tensors_are_named(bfl_file, bfl_state, change, message):
    change(bfl_state)
    with pytest.raises(CheckpointError, match=message) as error:
        FluxTransformer.from_single_file(bfl_file(bfl_state))
    assert "flux.safetensors" in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 100, 50_000, -1])
def test_truncated_file_is_named(bfl_file, size):
    path = bfl_file()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"flux\.safetensors: not a whole safetensors file"):
        FluxTransformer.from_single_file(path)


def test_other_files_are_refused(tmp_path):
    for name, message in (("model.ckpt", "pickle"), ("noise.safetensors", "not a whole"), ("absent.safetensors", "no such")):
        if "absent" not in name:
            (tmp_path / name).write_bytes(bytes(range(256)) * 10)
        with pytest.raises(CheckpointError, match=message):
            FluxTransformer.from_single_file(tmp_path / name)


def test_head_size_without_flux_proportions(bfl_file):
    state = BflFlux(**BFL | {"n_heads": 4}, axes=(4, 4, 8), guidance=False).state_dict()
    with pytest.raises(CheckpointError, match="axes_dims_rope"):
        FluxTransformer.from_single_file(bfl_file(state))
    assert FluxTransformer.from_single_file(bfl_file(state), axes_dims_rope=(4, 4, 8)).config.axes_dims_rope == (4, 4, 8)


def test_config_and_arguments(bfl_file, tmp_path, folder):
    config = dict(FluxTransformer.from_single_file(bfl_file()).config) | {"axes_dims_rope": [8, 12, 12]}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    for given in (tmp_path, tmp_path / "config.json", {**config}):
        assert list(FluxTransformer.from_single_file(bfl_file(), config=given).config.axes_dims_rope) == [8, 12, 12]
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
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "SD3Transformer2DModel"}))
    refused("describes a SD3Transformer2DModel")
    (folder / "config.json").write_text("{")
    refused("config.json: not valid JSON")
    (folder / "config.json").write_text(json.dumps(config))
    index.unlink()
    refused("neither")
    (tmp_path / "model_index.json").write_text("{}")
    refused("subfolder='transformer'", path=tmp_path)
