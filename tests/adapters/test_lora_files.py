import json

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_flux import pipeline, run, tiny_transformer, train

from fluxfast.adapters.formats import load_lora, modelspec_metadata, read_lora, save_lora
from fluxfast.adapters.lora import add_lora, lora_layers

FILE = "pytorch_lora_weights.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


def _trained(**arguments):
    transformer = tiny_transformer()
    parameters = add_lora(transformer, **{"targets": "all+ffs", "rank": 4, "alpha": 10, **arguments})
    train(parameters)
    return transformer


def _metadata(path):
    with safe_open(path, framework="pt") as reader:
        return reader.metadata()


def _pairs(prefix="transformer.", rank=4):
    g = torch.Generator().manual_seed(5)
    return {
        f"{prefix}{TO_Q}.lora_A.weight": torch.randn(rank, 32, generator=g),
        f"{prefix}{TO_Q}.lora_B.weight": torch.randn(32, rank, generator=g),
    }


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_diffusers_pipeline_loads_it_with_its_scale(tmp_path, format, init):
    transformer = _trained(init=init, dropout=0.25)
    expected, untrained = run(transformer), run(tiny_transformer())
    assert not torch.allclose(expected, untrained, atol=0.05)
    assert save_lora(transformer, tmp_path, format=format) == tmp_path / FILE

    pipe = pipeline(tiny_transformer())
    pipe.load_lora_weights(str(tmp_path))
    # the saved pair of an adapter from the base is a difference, taken in fp32
    exact = {"rtol": 0, "atol": 0} if init == "default" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(run(pipe.transformer), expected, **exact)
    pipe.unload_lora_weights()
    # loading must not have touched the base
    assert torch.equal(run(pipe.transformer), untrained)


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_keys_and_metadata(tmp_path, format):
    transformer = _trained(targets=["to_q", "proj_out"], dropout=0.25)
    path = save_lora(transformer, tmp_path / "my.safetensors", format=format, metadata={"modelspec.title": "me"})
    assert path == tmp_path / "my.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == ["my.safetensors"]
    state, metadata = load_file(path), _metadata(path)
    modules = list(lora_layers(transformer))
    assert len(modules) == 6
    keys = {f"transformer.{m}.lora_{x}.weight" for m in modules for x in "AB"}
    assert metadata["format"] == "pt"
    assert metadata["modelspec.title"] == "me"
    if format == "comfyui":
        alphas = {f"transformer.{m}.alpha" for m in modules}
        assert state.keys() == keys | alphas
        for key in alphas:
            assert state[key].shape == ()
            assert state[key].dtype == torch.float32
            assert state[key] == 10
        assert "lora_adapter_metadata" not in metadata
    else:
        assert state.keys() == keys
        adapter = json.loads(metadata["lora_adapter_metadata"])
        assert adapter["transformer.r"] == 4
        assert adapter["transformer.lora_alpha"] == 10
        assert adapter["transformer.lora_dropout"] == 0
        assert adapter["transformer.target_modules"] == ["proj_out", "to_q"]
        assert adapter["transformer.init_lora_weights"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_init_lora_goes_on_exactly(tmp_path, format, dtype):
    transformer = _trained(dtype=dtype)
    first = save_lora(transformer, tmp_path / "first", format=format)
    again = tiny_transformer()
    parameters = load_lora(again, first, dtype=dtype, dropout=0.1)
    assert len(parameters) == 2 * len(lora_layers(transformer))
    assert all(p.requires_grad and p.dtype == dtype for p in parameters)
    assert torch.equal(run(again), run(transformer))
    second = save_lora(again, tmp_path / "second", format=format)
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    # and the second generation is as loadable as the first
    pipe = pipeline(tiny_transformer())
    pipe.load_lora_weights(str(tmp_path / "second"))
    # diffusers computes in the base's fp32, a bf16 adapter in bf16: 2^-8 of outputs around 1
    atol = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(run(pipe.transformer), run(transformer), rtol=0, atol=atol)


def test_init_lora_of_a_bf16_base_keeps_an_fp32_files_bits(tmp_path):
    path = save_lora(_trained(), tmp_path)
    transformer = tiny_transformer(torch.bfloat16)
    load_lora(transformer, path)
    state = load_file(path)
    for name, layer in lora_layers(transformer).items():
        assert torch.equal(layer.lora_A["default"].weight, state[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B["default"].weight, state[f"transformer.{name}.lora_B.weight"])


def test_one_adapter_always_gives_the_same_bytes(tmp_path):
    transformer = _trained(targets=["to_q"])
    metadata = {f"key {i}": "value é" for i in range(9)}
    files = [save_lora(transformer, tmp_path / str(i), metadata=metadata) for i in range(8)]
    # safetensors itself orders metadata at random
    assert len({save({"x": torch.ones(1)}, metadata=metadata) for _ in files}) > 1
    assert len({file.read_bytes() for file in files}) == 1
    assert metadata.items() <= _metadata(files[0]).items()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    transformer = _trained(targets=["to_q"])
    path = save_lora(transformer, tmp_path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_lora(transformer, tmp_path, format="comfyui")
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert path.read_bytes() == before


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'kohya'"):
        save_lora(_trained(targets=["to_q"]), tmp_path, format="kohya")  # type: ignore[arg-type]


# BFL's and kohya's names for what a tiny model has too, with its sizes
KOHYA = {
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
    "img_in": ["x_embedder"],
}


@pytest.mark.parametrize("layout", ["kohya", "comfyui-bfl", "comfyui-bfl-lora_A"])
def test_kohya_and_bfl_names(tmp_path, layout):
    g = torch.Generator().manual_seed(3)
    transformer = tiny_transformer()
    deltas, state = {}, {}
    for kohya, modules in KOHYA.items():
        linears = [transformer.get_submodule(name) for name in modules]
        a = torch.randn(2, linears[0].in_features, generator=g)
        b = torch.randn(sum(m.out_features for m in linears), 2, generator=g)
        # alpha 3 for rank 2
        for name, part in zip(modules, (1.5 * b @ a).split([m.out_features for m in linears]), strict=True):
            deltas[name] = part
        dotted = kohya.replace("blocks_0_", "blocks.0.").replace("blocks_1_", "blocks.1.")
        for sub in ("img_attn", "txt_mlp"):
            dotted = dotted.replace(f"{sub}_", f"{sub}.")
        prefix = f"lora_unet_{kohya}" if layout == "kohya" else f"diffusion_model.{dotted}"
        pair = ("lora_A", "lora_B") if layout == "comfyui-bfl-lora_A" else ("lora_down", "lora_up")
        state |= {f"{prefix}.{pair[0]}.weight": a, f"{prefix}.{pair[1]}.weight": b, f"{prefix}.alpha": torch.tensor(3.0)}
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    lora = read_lora(path)
    assert set(lora.targets) == deltas.keys()
    load_lora(transformer, path)
    for name, layer in lora_layers(transformer).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), deltas[name])


def test_fused_single_block_of_the_real_size(tmp_path):
    # the converter splits linear1 of FLUX.1's own sizes only
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 3072, generator=g), torch.randn(21504, 2, generator=g)
    path = tmp_path / "x.safetensors"
    save_file(
        {"lora_unet_single_blocks_37_linear1.lora_down.weight": a, "lora_unet_single_blocks_37_linear1.lora_up.weight": b}, path
    )
    lora = read_lora(path)
    block = "single_transformer_blocks.37"
    assert lora.targets == [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    torch.testing.assert_close(lora.state[f"{block}.proj_mlp.lora_B.weight"], b[9216:])
    torch.testing.assert_close(lora.state[f"{block}.proj_mlp.lora_A.weight"], a)


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "diffusion_model."])
def test_peft_names_under_any_prefix(tmp_path, prefix):
    path = tmp_path / "x.safetensors"
    state = _pairs(prefix)
    save_file(state, path)
    lora = read_lora(path)
    assert lora.targets == [TO_Q]
    assert (lora.rank, lora.alpha) == (4, 4.0)
    assert torch.equal(lora.state[f"{TO_Q}.lora_A.weight"], state[f"{prefix}{TO_Q}.lora_A.weight"])
    save_file(state | {f"{prefix}{TO_Q}.alpha": torch.tensor(1.5)}, path)
    assert read_lora(tmp_path).alphas == {TO_Q: 1.5}


def test_rank_and_alpha_per_module(tmp_path):
    state, k = _pairs(), "transformer_blocks.0.attn.to_k"
    g = torch.Generator().manual_seed(6)
    for module, rank, (out, inp) in [(k, 3, (32, 32)), ("proj_out", 2, (8, 32)), ("x_embedder", 4, (32, 8))]:
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, inp, generator=g)
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    alphas = {TO_Q: 4.0, k: 9.0, "proj_out": 5.0, "x_embedder": 4.0}
    path = tmp_path / "x.safetensors"
    save_file(state | {f"transformer.{m}.alpha": torch.tensor(a) for m, a in alphas.items()}, path)
    lora = read_lora(path)
    assert lora.alphas == alphas
    assert (lora.rank, lora.alpha) == (4, 4.0)

    transformer = tiny_transformer()
    load_lora(transformer, path)
    layers = lora_layers(transformer)
    # `proj_out` is the transformer's own, not the single blocks'
    assert layers.keys() == alphas.keys()
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == {
        TO_Q: 1,
        k: 3,
        "proj_out": 2.5,
        "x_embedder": 1,
    }
    expected = run(transformer)
    for format in ("diffusers", "comfyui"):
        folder = save_lora(transformer, tmp_path / format, format=format).parent
        assert read_lora(folder).alphas == alphas
        pipe = pipeline(tiny_transformer())
        pipe.load_lora_weights(str(folder))
        torch.testing.assert_close(run(pipe.transformer), expected)


def test_alpha_from_diffusers_own_file(tmp_path):
    transformer = _trained(targets=["to_q"])
    transformer.save_lora_adapter(tmp_path)
    assert read_lora(tmp_path).alphas == dict.fromkeys(lora_layers(transformer), 10.0)
    FluxPipeline.save_lora_weights(
        tmp_path / "pipeline",
        transformer_lora_layers=_pairs(prefix=""),
        transformer_lora_adapter_metadata={"r": 4, "lora_alpha": 7, "use_rslora": True},
    )
    assert read_lora(tmp_path / "pipeline").alphas == {TO_Q: 14.0}


def _write(path, state, metadata=None):
    save_file(state, path, metadata=metadata)
    return path


BROKEN = {
    "lokr": ({"lycoris_x.lokr_w1": torch.ones(1)}, "LoKr"),
    "dora": (_pairs() | {f"transformer.{TO_Q}.dora_scale": torch.ones(32)}, "DoRA"),
    "a model": ({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, "no LoRA weights.*to_q.weight"),
    "half": ({f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 32)}, r"Missing keys: .*to_q\.lora_B\.weight"),
    "ranks": (_pairs() | {f"transformer.{TO_Q}.lora_B.weight": torch.ones(32, 3)}, "don't share a rank"),
    "extra": (_pairs() | {"transformer.lora_extra": torch.ones(1)}, "unexpected: lora_extra"),
    "text encoder": (_pairs() | {"text_encoder.a.lora_A.weight": torch.ones(1, 1)}, "text encoder weights"),
    "kohya": ({"lora_unet_middle_block_0.lora_down.weight": torch.ones(1, 1)}, "can't be converted.*middle_block_0"),
    "bad alpha": (_pairs() | {f"transformer.{TO_Q}.alpha": torch.tensor(1)}, "can't be converted.*alpha"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_foreign_files_are_refused_by_name(tmp_path, case):
    state, message = BROKEN[case]
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
        read_lora(_write(tmp_path / "bad.safetensors", state))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_refused_by_name(tmp_path, keep):
    path = save_lora(_trained(targets=["to_q"]), tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{FILE}: not a whole safetensors file"):
        read_lora(tmp_path)


def test_pickles_missing_files_and_ambiguous_folders_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"x\.bin: .*never loaded"):
        read_lora(tmp_path / "x.bin")
    with pytest.raises(ValueError, match="no such LoRA file"):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="found 0 files"):
        read_lora(tmp_path)
    for name in ("a", "b"):
        _write(tmp_path / f"{name}.safetensors", _pairs())
    with pytest.raises(ValueError, match="found 2 files"):
        read_lora(tmp_path)


def test_metadata_that_is_not_json_is_refused_by_name(tmp_path):
    path = _write(tmp_path / "x.safetensors", _pairs(), {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match=r"x\.safetensors: its metadata"):
        read_lora(path)


def test_a_lora_for_another_transformer_is_refused_before_anything_changes(tmp_path):
    transformer = tiny_transformer()
    names = dict(transformer.named_parameters()).keys()
    state = _pairs()
    for i in range(5):
        state |= {k.replace("blocks.0", f"blocks.{i}"): v.clone() for k, v in _pairs().items()}
    path = _write(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match=r"x\.safetensors: .*no such linear layers: transformer_blocks\.1.* and 1 more"):
        load_lora(transformer, path)
    wide = {f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 48), f"transformer.{TO_Q}.lora_B.weight": torch.ones(32, 4)}
    path = _write(tmp_path / "y.safetensors", wide)
    with pytest.raises(ValueError, match=r"y\.safetensors: .*to_q\.lora_A: expected \[4, 32\] .*, found \[4, 48\]"):
        load_lora(transformer, path)
    assert dict(transformer.named_parameters()).keys() == names


def test_modelspec(tmp_path):
    metadata = modelspec_metadata(
        flavour="dev",
        title="run",
        resolution=(1024, 768),
        global_step=500,
        trained_words=["sks dog", "sks"],
    )
    assert metadata == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-dev/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "run",
        "modelspec.resolution": "1024x768",
        "modelspec.trigger_phrase": "sks dog, sks",
        "global_step": "500",
    }
    plain = modelspec_metadata(flavour="krea", title="t", resolution=(512, 512), global_step=0)
    assert plain["global_step"] == "0"
    assert "modelspec.trigger_phrase" not in plain
    path = save_lora(_trained(targets=["to_q"]), tmp_path, metadata=metadata)
    assert metadata.items() <= _metadata(path).items()
