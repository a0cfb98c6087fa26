"""`fluxfast.load_lora` and `save_lora`: any program's file on a model, and back, values and all."""

import pytest
import torch
from lora_file_cases import pairs, write
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_flux import run, tiny_transformer, train

import fluxfast
from fluxfast.adapters.kind import trainable_parameters
from lycoris_cases import trained

# LoRA and DoRA; what each can be written as
FORMATS = ("diffusers", "comfyui", "kohya", "lycoris")
MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")


def with_lora(**options):
    model = tiny_transformer()
    train(fluxfast.add_lora(model, targets=["to_q", "proj_mlp"], rank=3, alpha=6.0, **options))
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_saved_acts_the_same_on_another_model(tmp_path, format):
    model = with_lora()
    path = fluxfast.save_lora(model, tmp_path / f"{format}.safetensors", format=format)
    again = tiny_transformer()
    base = run(again)
    parameters = fluxfast.load_lora(again, path)
    assert [id(p) for p in parameters] == [id(p) for p in trainable_parameters(again).values()]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert all(p.requires_grad for p in parameters)
    # fp32 products in another order
    torch.testing.assert_close(run(again), run(model), rtol=1e-4, atol=1e-5)
    assert (run(again) - base).abs().max() > 1e-2
    # the same adapter gives the same bytes
    assert fluxfast.save_lora(again, tmp_path / "again", format=format).read_bytes() == (
        path.read_bytes()
    )


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "kohya"])
def test_dora_comes_back(tmp_path, format):
    model = with_lora(dora=True)
    path = fluxfast.save_lora(model, tmp_path / f"{format}.safetensors", format=format)
    again = tiny_transformer()
    fluxfast.load_lora(again, path)
    torch.testing.assert_close(run(again), run(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["lokr", "lokr with magnitude", "loha", "full"])
def test_algorithms_of_lycoris_come_back(tmp_path, case):
    model = tiny_transformer()
    state = {
        f"lycoris_{name.replace('.', '_')}.{part}": tensor
        for seed, name in enumerate(MODULES)
        for part, tensor in trained(case, model.get_submodule(name), seed).items()
    }
    base = run(model)
    parameters = fluxfast.load_lora(model, write(tmp_path / "x.safetensors", state))
    assert len(parameters) == len(trainable_parameters(model)) > 0
    assert (run(model) - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has an adapter of LyCORIS already"):
        fluxfast.load_lora(model, tmp_path / "x.safetensors")
    again = tiny_transformer()
    fluxfast.load_lora(again, fluxfast.save_lora(model, tmp_path / "again", format="lycoris"))
    torch.testing.assert_close(run(again), run(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no lora_format 'kohya'"):
        fluxfast.save_lora(model, tmp_path / "k", format="kohya")


def test_on_fluxfasts_own_model_and_an_accelerated_one(tmp_path):
    source = with_lora()
    path = fluxfast.save_lora(source, tmp_path, metadata={"author": "me"})
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata()["author"] == "me"
    expected = run(source)
    own = fluxfast.FluxTransformer(**{k: v for k, v in source.config.items() if k[0] != "_"})
    own.load_state_dict(tiny_transformer().state_dict())
    accelerated = tiny_transformer()
    fluxfast.accelerate(accelerated)
    for model in (own.eval(), accelerated):
        fluxfast.load_lora(model, path)
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


def test_several_by_name_and_pefts_own(tmp_path):
    first = fluxfast.save_lora(with_lora(), tmp_path / "first")
    model = tiny_transformer()
    fluxfast.load_lora(model, first, adapter_name="first", dtype=torch.bfloat16)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "second")
    saved = fluxfast.save_lora(model, tmp_path / "second", adapter_name="second")
    assert {key.rpartition(".lora_")[0].rpartition(".")[2] for key in load_file(saved)} == {"to_k"}
    with pytest.raises(ValueError, match="has an adapter 'first' already; choose another"):
        fluxfast.load_lora(model, first, adapter_name="first")
    with pytest.raises(ValueError, match="one of first, second; got 'frist'; did you mean 'first'"):
        fluxfast.save_lora(model, tmp_path / "x", adapter_name="frist")
    with pytest.raises(ValueError, match=r"lora_format: .*got 'comfy'; did you mean 'comfyui'"):
        fluxfast.save_lora(model, tmp_path / "x", adapter_name="second", format="comfy")


def test_what_is_left_out_of_a_file_is_told(tmp_path, caplog):
    text = {"text_encoder.x.lora_A.weight": torch.ones(1, 2)}
    fluxfast.load_lora(tiny_transformer(), write(tmp_path / "x.safetensors", pairs() | text))
    assert "tensors of text encoders are left out" in caplog.text


def test_another_models_lora_is_refused_before_anything_changes(tmp_path):
    model = tiny_transformer()
    names = [name for name, _ in model.named_parameters()]
    path = write(tmp_path / "x.safetensors", pairs("transformer_blocks.7.attn.to_q"))
    with pytest.raises(ValueError, match=r"x\.safetensors: the transformer has no such linear"):
        fluxfast.load_lora(model, path)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
