"""Adapter files of every algorithm: each tensor is read, under whatever name, or refused."""

import pytest
import torch
from lora_file_cases import TO_Q, write
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from test_lora_reading import BFL
from tiny_flux import tiny_transformer, train
from torch import nn

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.lora_read import read_lora
from lycoris_cases import OPTIONS, output, output_by_formula, trained

ALGORITHMS = {"locon": "lora", "dylora": "lora"}
# how a module is written by those who write LyCORIS's names of tensors after it
SPELLINGS = {
    "fluxfast": lambda module: f"transformer.{module}",
    "ComfyUI": lambda module: f"diffusion_model.{module}",
    "LyCORIS": lambda module: f"lycoris_{module.replace('.', '_')}",
    "OneTrainer": lambda module: f"lora_transformer_{module.replace('.', '_')}",
    "kohya": lambda module: f"lora_unet_{module.replace('.', '_')}",
    "bare": lambda module: module,
}
QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.1.linear1"
OUT = "final_layer.adaLN_modulation.1"


def _algorithm(case):
    algo = OPTIONS[case]["algo"]
    return ALGORITHMS.get(algo, algo)


def _linear(rows, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(32, rows)


def _rows_of(linear, first, count):
    part = nn.Linear(linear.in_features, count)
    part.weight.data = linear.weight.data[first : first + count]
    part.bias.data = linear.bias.data[first : first + count]
    return part


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", OPTIONS)
def test_every_algorithm_in_every_spelling(tmp_path, case, spelling):
    modules = ["transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.1.proj_mlp"]
    linear = _linear(64)
    tensors = {module: trained(case, linear, seed) for seed, module in enumerate(modules)}
    state = {
        f"{SPELLINGS[spelling](module)}.{name}": t
        for module, parts in tensors.items()
        for name, t in parts.items()
    }
    file = read_adapter(write(tmp_path / "x.safetensors", state, {"key": "value"}))
    assert file.notes == () and file.metadata["key"] == "value"
    assert sorted(file.targets) == sorted(modules)
    assert file.algos == dict.fromkeys(file.targets, _algorithm(case))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for module, parts in file.tensors().items():
        # the same tensors, so the same bits
        assert len(parts) == len(tensors[module])
        assert torch.equal(output(parts, linear, x), output(tensors[module], linear, x))


@pytest.mark.parametrize("name", [QKV, LINEAR1, OUT])
@pytest.mark.parametrize("case", OPTIONS)
def test_fused_linears_are_taken_apart_exactly_or_refused(tmp_path, case, name):
    modules = BFL[name]
    rows = [128 if module.endswith("proj_mlp") else 32 for module in modules]
    linear = _linear(sum(rows))
    # so that w1, or the blocks, can be shared out
    factor = {QKV: 6, LINEAR1: 7, OUT: 4}[name]
    divisible = {"lora_dim": 2 * factor} if "boft" in case else {"factor": factor}
    tensors = trained(case, linear, **divisible)
    path = write(
        tmp_path / "x.safetensors", {f"diffusion_model.{name}.{p}": t for p, t in tensors.items()}
    )
    for refused, reason in (("boft", "mixes all rows"), ("constraint", "its constraint is on")):
        if refused in case:
            with pytest.raises(ValueError, match=rf"{name} is .*taken apart for these: .*{reason}"):
                read_adapter(path)
            return
    file = read_adapter(path)
    assert file.targets == modules
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    expected = output(tensors, linear, x)
    if name == OUT:
        # diffusers' linear has the halves of the rows in the other order
        linear.weight.data = torch.cat(linear.weight.data.chunk(2)[::-1])
        linear.bias.data = torch.cat(linear.bias.data.chunk(2)[::-1])
        expected = torch.cat(expected.chunk(2, dim=-1)[::-1], dim=-1)
    first = 0
    for module, count in zip(modules, rows, strict=True):
        got = output_by_formula(file.tensors()[module], _rows_of(linear, first, count), x)
        # the same products in fp32, in blocks of another size
        torch.testing.assert_close(got, expected[:, first : first + count], rtol=1e-5, atol=1e-5)
        first += count


def test_a_lokr_that_cuts_across_q_k_and_v_is_refused(tmp_path):
    tensors = trained("lokr whole", _linear(96))
    assert tensors["lokr_w1"].shape == (4, 4)
    state = {f"lycoris_double_blocks_0_img_attn_qkv.{name}": t for name, t in tensors.items()}
    with pytest.raises(
        ValueError, match=r"lokr_w1 \[4, 4\] can't be shared out to 3 linears of 32"
    ):
        read_adapter(write(tmp_path / "x.safetensors", state))


def test_magnitudes_of_columns_are_not_shared_out_to_rows(tmp_path):
    tensors = trained("loha", _linear(96)) | {"dora_scale": torch.ones(1, 32)}
    state = {f"lora_unet_double_blocks_0_img_attn_qkv.{name}": t for name, t in tensors.items()}
    with pytest.raises(ValueError, match="its dora_scale divides by the norms of whole columns"):
        read_adapter(write(tmp_path / "x.safetensors", state))


def test_algorithms_may_be_mixed_and_text_encoders_are_left_out(tmp_path):
    linear = _linear(64)
    modules = {case: f"transformer_blocks.{i}.ff.net.0.proj" for i, case in enumerate(OPTIONS)}
    state = {
        f"lycoris_{module.replace('.', '_')}.{name}": t
        for case, module in modules.items()
        for name, t in trained(case, linear).items()
    }
    text = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{name}": t
        for name, t in trained("lokr", linear).items()
    }
    file = read_adapter(write(tmp_path / "x.safetensors", state | text))
    assert file.algos == {module: _algorithm(case) for case, module in modules.items()}
    assert [f"{len(text)} tensors of text encoders are left out" in n for n in file.notes] == [True]
    with pytest.raises(
        ValueError, match=r"holds LoKr, .*LoHa, .*which no run of lora_type standard"
    ):
        read_lora(file.path)


def test_alpha_without_a_tensor_of_its_own(tmp_path):
    linear = _linear(64)
    for case, alpha in {"lokr": 2, "lokr whole": 1, "loha": 3, "glora": 3, "diag-oft": 0}.items():
        tensors = {name: t for name, t in trained(case, linear).items() if name != "alpha"}
        state = {f"transformer.{TO_Q}.{name}": t for name, t in tensors.items()}
        assert (
            read_adapter(write(tmp_path / "x.safetensors", state)).state[f"{TO_Q}.alpha"] == alpha
        )


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("kind", [LoKrConfig, LoHaConfig])
def test_pefts_lokr_and_loha_with_the_alpha_of_their_config(tmp_path, kind, rank):
    model = get_peft_model(
        tiny_transformer(),
        kind(r=rank, alpha=3, target_modules=["to_q", "proj_mlp"], alpha_pattern={"to_q": 5}),
    )
    train([p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path)
    file = read_adapter(tmp_path)
    assert file.algos == dict.fromkeys(file.targets, {LoKrConfig: "lokr", LoHaConfig: "loha"}[kind])
    assert len(file.targets) == 5
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    base = tiny_transformer()
    for module, tensors in file.tensors().items():
        with torch.no_grad():
            expected = model.get_submodule(f"base_model.model.{module}")(x)
        got = output(tensors, base.get_submodule(module), x)
        # two fp32 products in another order
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_dora_by_pefts_and_by_lycoris_names(tmp_path):
    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], use_dora=True))
    train([p for p in model.parameters() if p.requires_grad])
    layer = model.get_submodule(TO_Q)
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    a, b = (getattr(layer, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    alpha = torch.tensor(3.0)
    pefts = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude}
    lycoris = {"lora_down.weight": a, "lora_up.weight": b, "dora_scale": magnitude[:, None]}
    for parts in (pefts, lycoris):
        state = {f"transformer.{TO_Q}.{name}": t for name, t in (parts | {"alpha": alpha}).items()}
        lora = read_lora(write(tmp_path / "x.safetensors", state))
        assert torch.equal(lora.state[f"{TO_Q}.lora_magnitude_vector"], magnitude)
        assert lora.alphas == {TO_Q: 3}
    # and by lycoris-lora's own formula it is what PEFT computes
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            output(lycoris | {"alpha": alpha}, tiny_transformer().get_submodule(TO_Q), x),
            layer(x),
            rtol=1e-5,
            atol=1e-5,
        )


def test_q_k_and_v_that_trained_apart_in_one_pair_keep_their_ranks(tmp_path):
    g = torch.Generator().manual_seed(4)
    a = torch.randn(6, 32, generator=g)
    b = [torch.randn(32, 2, generator=g) for _ in "qkv"]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": torch.block_diag(*b)}
    lora = read_lora(
        write(tmp_path / "x.safetensors", state | {f"{name}.alpha": torch.tensor(3.0)})
    )
    assert lora.ranks == dict.fromkeys(BFL[QKV], 2) and set(lora.alphas.values()) == {1.0}
    for i, module in enumerate(BFL[QKV]):
        assert torch.equal(lora.state[f"{module}.lora_A.weight"], a[2 * i : 2 * i + 2])
        assert torch.equal(lora.state[f"{module}.lora_B.weight"], b[i])
