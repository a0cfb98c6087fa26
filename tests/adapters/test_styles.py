"""Files in every style, read by the programs that they are for and by ourselves."""

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from lora_file_cases import products, write
from lycoris.wrapper import create_lycoris_from_weights
from peft import LoraConfig
from safetensors.torch import load_file
from test_lora_files import _trained as trained_lora
from tiny_flux import pipeline, run, tiny_transformer, train

from fluxfast.adapters import writing
from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.find_lora import header_of
from fluxfast.adapters.lora_read import read_lora
from fluxfast.adapters.lora_write import save_lora
from fluxfast.adapters.readers import PROGRAM_OF, readers
from fluxfast.adapters.styles import STYLES, styled, write_styled
from fluxfast.config.adapters import LORA_FORMATS
from lycoris_cases import OPTIONS, output, output_by_formula, trained

MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")


def adapter(tmp_path, case, modules=MODULES):
    """The adapter of a case on modules of the tiny transformer, as it is read from a file."""
    transformer = tiny_transformer()
    state = {
        f"lycoris_{module.replace('.', '_')}.{name}": t
        for seed, module in enumerate(modules)
        for name, t in trained(case, transformer.get_submodule(module), seed).items()
    }
    return read_adapter(write(tmp_path / "source.safetensors", state))


def who_reads(path, file):
    return {name for name, reason in readers(file, *header_of(path)).items() if not reason}


def inputs():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(3))


def outputs(file, formula=output_by_formula):
    """Each module's output with its adapter, by lycoris-lora's modules or formulas."""
    transformer = tiny_transformer()
    return {
        module: formula(tensors, transformer.get_submodule(module), inputs())
        for module, tensors in file.tensors().items()
    }


def test_the_options_formats_are_the_styles():
    assert tuple(STYLES) == LORA_FORMATS == tuple(PROGRAM_OF)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", OPTIONS)
def test_every_algorithm_comes_back_from_every_style(tmp_path, case, style):
    file = adapter(tmp_path, case)
    if style == "kohya" and OPTIONS[case]["algo"] not in ("locon", "dylora"):
        with pytest.raises(ValueError, match="kohya's files hold LoRA alone, and"):
            write_styled(tmp_path / "x.safetensors", file, style)
        assert not (tmp_path / "x.safetensors").exists()
        return
    path = write_styled(tmp_path / "x.safetensors", file, style, {"modelspec.title": "me"})
    again = read_adapter(path)
    assert again.notes == () and again.metadata["modelspec.title"] == "me"
    assert again.metadata["fluxfast_version"]
    # a fused linear of BFL's has all its parts
    assert again.algos.items() >= file.algos.items()
    expected, got = outputs(file), outputs(again)
    for module in file.targets:
        # the scale may have moved into w1, in fp32
        torch.testing.assert_close(got[module], expected[module], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", OPTIONS)
def test_lycoris_lora_reads_its_style(tmp_path, case):
    file = adapter(tmp_path, case)
    path = write_styled(tmp_path / "x.safetensors", file, "lycoris")
    transformer = tiny_transformer()
    if case.startswith("ia3"):
        assert "lycoris-lora" not in who_reads(path, file)
        with pytest.raises(TypeError):
            create_lycoris_from_weights(1.0, str(path), transformer)
        return
    assert "lycoris-lora" in who_reads(path, file)
    expected = outputs(file, output)
    network, _ = create_lycoris_from_weights(1.0, str(path), transformer)
    network.apply_to()
    assert len(network.loras) == len(MODULES)
    for module in file.targets:
        with torch.no_grad():
            got = transformer.get_submodule(module)(inputs())
        torch.testing.assert_close(got, expected[module], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["lokr", "lokr whole", "lokr of four"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_reads_lokr(tmp_path, case, dtype):
    # alpha / rank is 1.5 here: w1 of bf16 becomes fp32, where it isn't to be rounded again
    file = adapter(tmp_path, case).to(dtype)
    path = write_styled(tmp_path / "x.safetensors", file, "diffusers")
    assert who_reads(path, file) == {"diffusers", "ComfyUI"}
    assert not any("alpha" in key for key in load_file(path))
    transformer = tiny_transformer()
    transformer.load_lora_adapter(load_file(path), prefix="transformer")
    expected = outputs(file.to(torch.float32))
    for module in file.targets:
        with torch.no_grad():
            got = transformer.get_submodule(module)(inputs())
        torch.testing.assert_close(got, expected[module], rtol=1e-5, atol=1e-5)


def test_diffusers_can_not_read_lokrs_of_two_factors(tmp_path):
    transformer, state = tiny_transformer(), {}
    for module, factor in zip(MODULES, (2, 8), strict=True):
        linear = transformer.get_submodule(module)
        tensors = trained("lokr whole", linear, factor=factor)
        state |= {f"transformer.{module}.{name}": t for name, t in tensors.items()}
    file = read_adapter(write(tmp_path / "x.safetensors", state))
    path = write_styled(tmp_path / "y.safetensors", file, "diffusers")
    reasons = readers(file, *header_of(path))
    assert reasons["diffusers"] == "it reads LoKr of one factor for all modules"
    assert reasons["ComfyUI"] is None
    with pytest.raises(ValueError, match="Could not infer a `decompose_factor`"):
        transformer.load_lora_adapter(load_file(path), prefix="transformer")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_loras_readers(tmp_path, style, dora):
    """The whole pipeline of diffusers, and which programs are named."""
    transformer = tiny_transformer()
    # of the linears that BFL fuses, all parts: kohya's files have no place for a DoRA of some
    targets = ["to_q", "to_k", "to_v", "proj_mlp", "to_out.0"]
    parameters = _add(transformer, targets, dora)
    train(parameters)
    path = save_lora(transformer, tmp_path / style, format=style)
    found = who_reads(path, read_adapter(path))
    # alpha is not the rank, which ComfyUI sees in tensors alone
    assert ("ComfyUI" in found) == (style != "diffusers")
    assert ("kohya's scripts" in found) == (style == "kohya" and not dora)
    assert ("lycoris-lora" in found) == (style == "lycoris")
    diffusers_reads = style == "diffusers" or (style in ("comfyui", "kohya") and not dora)
    assert ("diffusers" in found) == diffusers_reads
    if diffusers_reads and style != "kohya":
        pipe = pipeline(tiny_transformer())
        pipe.load_lora_weights(str(path.parent))
        # diffusers scales in another place
        torch.testing.assert_close(run(pipe.transformer), run(transformer), rtol=1e-5, atol=1e-5)


def _add(transformer, targets, dora):
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_dora=dora))
    return [p for p in transformer.parameters() if p.requires_grad]


@pytest.mark.parametrize("targets", ["all+ffs+embedder", ["to_q"], ["to_k", "proj_mlp"]])
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_kohyas_style_is_exact(tmp_path, targets, init):
    transformer = trained_lora(targets=targets, init=init)
    expected = products(read_lora(save_lora(transformer, tmp_path / "a")))
    path = save_lora(transformer, tmp_path / "b", format="kohya")
    assert all(key.startswith("lora_unet_") for key in load_file(path))
    got = products(read_lora(path))
    for module, product in got.items():
        if module in expected:
            # block-diagonal B: the same products, and sums with zeros
            torch.testing.assert_close(product, expected[module], rtol=1e-6, atol=1e-7)
        else:
            assert not product.any()
    assert got.keys() >= expected.keys()


def test_kohyas_style_keeps_ranks_apart_and_together(tmp_path):
    """q, k and v that trained apart keep their bits and ranks; with one A they stay one pair."""
    path = save_lora(trained_lora(targets=["to_q", "to_k", "to_v"]), tmp_path / "apart")
    apart = read_adapter(path)
    again = read_adapter(write_styled(tmp_path / "k.safetensors", apart, "kohya"))
    modules = [name for name in apart.targets if name.startswith("transformer_blocks")]
    for name in modules:
        for part in ("lora_A.weight", "lora_B.weight", "alpha"):
            assert torch.equal(again.state[f"{name}.{part}"], apart.state[f"{name}.{part}"])
    shared = replace(
        apart,
        targets=modules,
        state={
            name: apart.state[f"{modules[0]}.lora_A.weight"] if "lora_A" in name else tensor
            for name, tensor in apart.state.items()
        },
    )
    tensors, _ = styled(shared, "kohya")
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 32)


def test_kohyas_style_with_other_scales_in_one_linear(tmp_path):
    file = read_adapter(save_lora(trained_lora(targets=["to_q", "to_k", "to_v"]), tmp_path))
    scales = {name: 1.0 + i for i, name in enumerate(file.targets)}
    state = file.state | {f"{name}.alpha": torch.tensor(s) for name, s in scales.items()}
    file = replace(file, state=state)
    lora = read_lora(write_styled(tmp_path / "k.safetensors", file, "kohya"))
    expected = products(read_lora(write_styled(tmp_path / "d.safetensors", file, "diffusers")))
    for module, product in expected.items():
        torch.testing.assert_close(products(lora)[module], product, rtol=1e-6, atol=1e-7)


def test_diffusers_converter_reads_kohyas_style(tmp_path):
    transformer = trained_lora(
        targets=[
            *(f"transformer_blocks.0.attn.{t}" for t in ("to_q", "to_k", "to_v", "to_out.0")),
            *(f"transformer_blocks.0.attn.add_{t}_proj" for t in "qkv"),
            "ff.net.2",
            "norm1.linear",
        ]
    )
    path = save_lora(transformer, tmp_path, format="kohya")
    theirs = _convert_kohya_flux_lora_to_diffusers(load_file(path))
    expected = products(read_lora(path))
    assert {k.split(".lora_")[0].removeprefix("transformer.") for k in theirs} == expected.keys()
    for module, product in expected.items():
        a, b = (theirs[f"transformer.{module}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, product, rtol=1e-5, atol=1e-6)
    # and so does the pipeline
    pipe = pipeline(tiny_transformer())
    pipe.load_lora_weights(str(path.parent))
    torch.testing.assert_close(run(pipe.transformer), run(transformer), rtol=1e-5, atol=1e-5)
    assert FluxLoraLoaderMixin.lora_state_dict(load_file(path)).keys() == theirs.keys()


def test_kohyas_style_refuses_a_part_of_a_dora(tmp_path):
    transformer = tiny_transformer()
    train(_add(transformer, ["to_q", "to_k"], True))
    with pytest.raises(ValueError, match=r"one DoRA for .*attn\.to_v.* together, and only .*to_q"):
        save_lora(transformer, tmp_path / "x.safetensors", format="kohya")


def test_a_file_that_comes_back_changed_does_not_take_its_name(tmp_path, monkeypatch):
    path = save_lora(trained_lora(targets=["to_q"]), tmp_path)
    before = path.read_bytes()

    def with_a_flipped_bit(tensors, metadata):
        data = bytearray(save(tensors, metadata))
        data[-1] ^= 1
        return bytes(data)

    save = writing.save
    monkeypatch.setattr(writing, "save", with_a_flipped_bit)
    with pytest.raises(OSError, match=r"to_q\.lora_B\.weight came back changed"):
        save_lora(trained_lora(targets=["to_q"]), tmp_path)
    monkeypatch.setattr(writing, "save", lambda tensors, metadata: save(tensors, metadata)[:-8])
    with pytest.raises(OSError, match="can't be read back"):
        save_lora(trained_lora(targets=["to_q"]), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


# what ComfyUI's model_lora_keys_unet has for FLUX.1 by prefix, and what its adapters look for
COMFYUI_PARTS = {
    "lora": ({"lora_up.weight", "lora_down.weight"}, {"lora_B.weight", "lora_A.weight"}),
    "lokr": (
        {"lokr_w1", "lokr_w2"},
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "glora": ({"a1.weight", "a2.weight", "b1.weight", "b2.weight"},),
    "full": ({"diff", "diff_b"}, {"diff"}),
    "diag-oft": ({"oft_blocks"}, {"oft_blocks", "rescale"}),
    "boft": ({"oft_blocks"}, {"oft_blocks", "rescale"}),
}


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "lycoris"])
@pytest.mark.parametrize("case", OPTIONS)
def test_comfyuis_key_rules(tmp_path, case, style):
    file = adapter(tmp_path, case)
    path = write_styled(tmp_path / "x.safetensors", file, style)
    stems = {
        "diffusers": {f"transformer.{module}": module for module in MODULES},
        "comfyui": {f"transformer.{module}": module for module in MODULES},
        "lycoris": {f"lycoris_{module.replace('.', '_')}": module for module in MODULES},
    }[style]
    found: dict[str, set[str]] = {}
    for key in load_file(path):
        stem = next(stem for stem in stems if key.startswith(f"{stem}."))
        found.setdefault(stem, set()).add(key.removeprefix(f"{stem}."))
    assert found.keys() == stems.keys()
    reads = "ComfyUI" in who_reads(path, file)
    if case.startswith("ia3") or "constraint" in case:
        assert not reads
        return
    for stem, module in stems.items():
        assert found[stem] - {"alpha", "dora_scale"} in COMFYUI_PARTS[file.algos[module]]
    assert reads == (case not in ("locon", "dylora") or style != "diffusers")
