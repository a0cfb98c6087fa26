import json

import pytest
import torch
from lora_file_cases import TO_Q, pairs, write
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_flux import pipeline, run, tiny_transformer, train

from fluxfast.adapters.lora import add_lora, load_lora
from fluxfast.adapters.lora_read import read_lora
from fluxfast.adapters.lora_state import lora_layers
from fluxfast.adapters.lora_write import save_lora
from fluxfast.adapters.writing import modelspec_metadata

FILE = "pytorch_lora_weights.safetensors"


def _trained(**arguments):
    transformer = tiny_transformer()
    parameters = add_lora(
        transformer, **{"targets": "all+ffs", "rank": 4, "alpha": 10, **arguments}
    )
    train(parameters)
    return transformer


def _metadata(path):
    with safe_open(path, framework="pt") as reader:
        return reader.metadata()


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
    path = save_lora(
        transformer, tmp_path / "my.safetensors", format=format, metadata={"modelspec.title": "me"}
    )
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
        assert adapter["transformer.target_modules"] == sorted(modules)
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
        assert torch.equal(
            layer.lora_A["default"].weight, state[f"transformer.{name}.lora_A.weight"]
        )
        assert torch.equal(
            layer.lora_B["default"].weight, state[f"transformer.{name}.lora_B.weight"]
        )


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
    with pytest.raises(ValueError, match="one of diffusers, comfyui, kohya, lycoris; got 'a1111'"):
        save_lora(_trained(targets=["to_q"]), tmp_path, format="a1111")


def test_rank_and_alpha_per_module(tmp_path):
    state, k = pairs(), "transformer_blocks.0.attn.to_k"
    g = torch.Generator().manual_seed(6)
    for module, rank, (out, inp) in [
        (k, 3, (32, 32)),
        ("proj_out", 2, (8, 32)),
        ("x_embedder", 4, (32, 8)),
    ]:
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


def test_a_lora_for_another_transformer_is_refused_before_anything_changes(tmp_path):
    transformer = tiny_transformer()
    names = dict(transformer.named_parameters()).keys()
    state = pairs()
    for i in range(5):
        state |= {k.replace("blocks.0", f"blocks.{i}"): v.clone() for k, v in pairs().items()}
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(
        ValueError,
        match=r"x\.safetensors: .*no such linear layers: transformer_blocks\.1.* and 1 more",
    ):
        load_lora(transformer, path)
    wide = {
        f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 48),
        f"transformer.{TO_Q}.lora_B.weight": torch.ones(32, 4),
    }
    path = write(tmp_path / "y.safetensors", wide)
    with pytest.raises(
        ValueError, match=r"y\.safetensors: .*to_q\.lora_A: expected \[4, 32\] .*, found \[4, 48\]"
    ):
        load_lora(transformer, path)
    # a square linear's factors changed about share a "rank" of 32
    turned = {
        f"transformer.{TO_Q}.lora_A.weight": torch.ones(32, 4),
        f"transformer.{TO_Q}.lora_B.weight": torch.ones(4, 32),
    }
    path = write(tmp_path / "t.safetensors", turned)
    with pytest.raises(
        ValueError, match=r"t\.safetensors: .*to_q\.lora_A: expected \[32, 32\] .*, found \[32, 4\]"
    ):
        load_lora(transformer, path)
    # block 19 is known to the reader, and not to a transformer of one
    path = write(
        tmp_path / "z.safetensors",
        {k.replace("blocks.0", "blocks.19"): v for k, v in pairs().items()},
    )
    with pytest.raises(
        ValueError,
        match=r"z\.safetensors: .*no such linear layers: transformer_blocks\.19\.attn\.to_q",
    ):
        load_lora(transformer, path)
    assert dict(transformer.named_parameters()).keys() == names


@pytest.mark.parametrize("alpha", [-4.0, 0.0, 1.5])
def test_an_unusual_alpha_is_kept_by_load_and_save(tmp_path, alpha):
    path = write(
        tmp_path / "x.safetensors", pairs() | {f"transformer.{TO_Q}.alpha": torch.tensor(alpha)}
    )
    transformer = tiny_transformer()
    load_lora(transformer, read_lora(path))
    assert lora_layers(transformer)[TO_Q].scaling["default"] == alpha / 4
    for format in ("diffusers", "comfyui"):
        again = read_lora(save_lora(transformer, tmp_path / format, format=format))
        assert again.alphas == {TO_Q: alpha}
        assert all(
            torch.equal(again.state[key], tensor) for key, tensor in read_lora(path).state.items()
        )


def test_modelspec(tmp_path):
    metadata = modelspec_metadata(
        architecture="flux-dev/lora",
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
    plain = modelspec_metadata(
        architecture="flux-krea", title="t", resolution=(512, 512), global_step=0
    )
    assert plain["global_step"] == "0"
    assert "modelspec.trigger_phrase" not in plain
    path = save_lora(_trained(targets=["to_q"]), tmp_path, metadata=metadata)
    assert metadata.items() <= _metadata(path).items()
