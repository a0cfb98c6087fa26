"""Files that are not what they should be are refused by name; the three layouts are told apart by
their keys.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.checkpoint import locate, naming, stream
from fluxfast.checkpoint.flux import CheckpointError, open_checkpoint
from fluxfast.checkpoint.naming import Source
from fluxfast.checkpoint.reader import TensorFiles
from fluxfast.quant import FORMATS
from support import SMALL

BFL = {
    "in_channels": 16,
    "dim": 64,
    "n_heads": 2,
    "depth": 1,
    "depth_single": 2,
    "context": 24,
    "pooled": 20,
}


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
    """On FLUX.1-dev's shape every one of our tensors has its place, and the packed ones add up to
    BFL's sizes.
    """
    with torch.device("meta"):
        ours = {
            k: tuple(v.shape) for k, v in FluxTransformer(guidance_embeds=True).state_dict().items()
        }
        theirs = BflFlux(
            **{
                "in_channels": 64,
                "dim": 3072,
                "n_heads": 24,
                "depth": 19,
                "depth_single": 38,
                "context": 4096,
                "pooled": 768,
            },
            axes=(16, 56, 56),
            guidance=True,
        ).state_dict()
    sources = naming.sources("bfl", ours)
    assert sources.keys() == ours.keys()
    elements = dict.fromkeys(theirs, 0)
    for name, source in sources.items():
        rows = source.rows or (0, theirs[source.key].shape[0])
        assert (rows[1] - rows[0], *theirs[source.key].shape[1:]) == ours[name]
        elements[source.key] += ours[name][0]
    assert elements == {k: v.shape[0] for k, v in theirs.items()}
    shapes = {k: tuple(v.shape) for k, v in theirs.items()}
    assert FluxTransformer.from_config(
        naming.infer_config("bfl", shapes, None) | {"num_layers": 0, "num_single_layers": 0}
    )


def test_diffusers_single_file_and_dtype(folder, tmp_path):
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
    save_file(state, tmp_path / "one.safetensors")
    model = FluxTransformer.from_single_file(
        tmp_path / "one.safetensors", torch_dtype=torch.bfloat16
    )
    again = FluxTransformer.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert (
            a.dtype == torch.bfloat16
            and torch.equal(a, b)
            and torch.equal(a, state[name].bfloat16())
        )
    assert not model.training


def test_fp8_file_loads(bfl_file, bfl_state):
    path = bfl_file(
        {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in bfl_state.items()}
    )
    weight = (
        FluxTransformer.from_single_file(path, torch_dtype=torch.bfloat16)
        .transformer_blocks[0]
        .attn.to_out[0]
        .weight
    )
    assert torch.equal(
        weight, bfl_state["double_blocks.0.img_attn.proj.weight"].to(torch.float8_e4m3fn).bfloat16()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("double_blocks.0.txt_attn.proj.bias"),
            "1 missing: double_blocks.0.txt_attn.proj.bias",
        ),
        (
            lambda s: s.update({"double_blocks.0.extra": torch.zeros(1)}),
            "1 unexpected: double_blocks.0.extra",
        ),
        (
            lambda s: s.update({"txt_in.bias": torch.zeros(63)}),
            r"txt_in.bias has shape \(63,\), expected \(64,\)",
        ),
        (lambda s: s.pop("img_in.weight"), "tensor img_in.weight is missing"),
        (
            lambda s: s.update({"img_in.weight": torch.zeros(64)}),
            r"img_in.weight has shape \(64,\), expected 2 dimensions",
        ),
        (
            lambda s: s.update({"txt_in.weight": torch.zeros(1, 64, 24)}),
            r"txt_in.weight has shape .*, expected 2 dimensions",
        ),
        (
            lambda s: s.update({"double_blocks.0.img_mlp.0.weight": torch.zeros(128, 64)}),
            "not the proportions of FLUX.1",
        ),
        (
            lambda s: s.update({"txt_in.bias": torch.zeros(64, dtype=torch.int32)}),
            "txt_in.bias holds torch.int32",
        ),
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


@pytest.mark.parametrize(
    "name", ["flux1-dev.sft", "flux1-dev.safetensor", "flux1-dev.bin", "flux1-dev", "flux1.dev-v2"]
)
def test_any_ending(bfl_file, bfl_state, tmp_path, monkeypatch, name):
    """A file is what its content says, under whatever name; also under a relative one, which is not
    asked of the hub.
    """
    bfl_file(name=name)
    monkeypatch.setattr(
        locate, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked")
    )
    monkeypatch.chdir(tmp_path)
    for load in (FluxTransformer.from_single_file, FluxTransformer.from_pretrained):
        weight = load(name).transformer_blocks[0].attn.to_out[0].weight
        assert torch.equal(weight, bfl_state["double_blocks.0.img_attn.proj.weight"])
    assert open_checkpoint(name).layout == "bfl"


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


@pytest.mark.parametrize("layout", ["bfl", "comfy", "diffusers"])
@pytest.mark.parametrize(
    ("times", "kind"), [(6, "FLUX.1 Fill"), (2, "FLUX.1 Canny, Depth"), (3, "something else")]
)
def test_more_input_channels(bfl_file, bfl_state, folder, tmp_path, layout, times, kind):
    """Fill and the control models, when they are opened as a base: in a file of any layout and in a
    folder.
    """
    name = "x_embedder.weight" if layout == "diffusers" else "img_in.weight"
    if layout == "diffusers":
        bfl_state = FluxTransformer.from_single_file(bfl_file()).state_dict()
    state = bfl_state | {name: torch.cat([bfl_state[name]] * 4 * times, 1)}
    if layout == "comfy":
        state = {naming.COMFY_PREFIX + key: tensor for key, tensor in state.items()}
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


def test_check_reads_no_weight(bfl_file, bfl_state, folder, monkeypatch):
    bfl_state["img_in.weight"][0] = torch.nan
    path = bfl_file(bfl_state)
    monkeypatch.setattr(TensorFiles, "stream", lambda *args: pytest.fail("a weight was read"))
    open_checkpoint(path).check(FluxTransformer)
    open_checkpoint(folder).check(FluxTransformer)
    for name, tensor, message in (
        ("txt_in.bias", torch.zeros(63), "txt_in.bias has shape"),
        ("txt_in.bias", torch.zeros(64, dtype=torch.int8), "txt_in.bias holds torch.int8"),
        ("extra", torch.zeros(1), "1 unexpected: extra"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(bfl_file(bfl_state | {name: tensor})).check(FluxTransformer)


FLOATS = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", FLOATS)
def test_require_finite(dtype):
    """Every code of the narrow types, among the most usual and the largest values, first, midway
    and last.
    """
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny], dtype=torch.float64
    )
    plain = values.repeat(100).to(dtype).view(4, 200)
    stream.require_finite("file", Source("plain"), plain)
    stream.require_finite("file", Source("empty"), plain[:0])
    if dtype.itemsize <= 2:
        integer = torch.int8 if dtype.itemsize == 1 else torch.int16
        codes = (
            torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1))
            .to(integer)
            .view(dtype)
        )
        odd = codes[~codes.double().isfinite()]
        stream.require_finite(
            "file", Source("all that are finite"), codes[codes.double().isfinite()]
        )
        odd = odd if dtype.itemsize == 1 else odd[::101]
    else:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    for value in odd:
        for place in ((0, 0), (2, 57), (3, 199)):
            broken = plain.clone()
            broken[place] = value
            with pytest.raises(
                CheckpointError,
                match=rf"file: broken: holds -?(nan|inf) at \[{place[0]}, {place[1]}\]",
            ):
                stream.require_finite("file", Source("broken"), broken)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("double_blocks.0.img_attn.qkv.weight", [150, 3]),
        ("single_blocks.1.linear1.bias", [447]),
        ("final_layer.adaLN_modulation.1.weight", [70, 1]),
        ("final_layer.linear.bias", [0]),
    ],
)
def test_a_weight_that_is_not_finite(bfl_file, bfl_state, name, place):
    """Named as the file names it, at its place in the file's tensor, of which the model's may be a
    part.
    """
    bfl_state[name][tuple(place)] = -torch.inf
    path = bfl_file(bfl_state)
    message = rf"flux\.safetensors: {name}: holds -inf at {re.escape(str(place))}, .*must be finite"
    with pytest.raises(CheckpointError, match=message):
        FluxTransformer.from_single_file(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).load(FluxTransformer, torch.bfloat16, format=FORMATS["int8"])


def test_head_size_without_flux_proportions(bfl_file):
    state = BflFlux(**BFL | {"n_heads": 4}, axes=(4, 4, 8), guidance=False).state_dict()
    with pytest.raises(CheckpointError, match="axes_dims_rope"):
        FluxTransformer.from_single_file(bfl_file(state))
    assert FluxTransformer.from_single_file(
        bfl_file(state), axes_dims_rope=(4, 4, 8)
    ).config.axes_dims_rope == (4, 4, 8)


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
