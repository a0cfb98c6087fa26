"""LoRA files of other programs: each pair's alpha / rank · B A, and what isn't a pair."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from lora_file_cases import TO_Q, pairs, products, write
from tiny_flux import tiny_transformer

from fluxfast.adapters.lora import load_lora
from fluxfast.adapters.lora_read import read_lora
from fluxfast.adapters.lora_state import lora_layers

RANK = 2

# every linear of FLUX.1, in BFL's names and diffusers'
BFL = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "single_blocks.1.modulation.lin": ["single_transformer_blocks.1.norm.linear"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
DIFFUSERS = {module: [module] for modules in BFL.values() for module in modules}
# XLabs' processors: scale 1, no alpha
XLABS = {
    "double_blocks.0.processor.qkv_lora1": BFL["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv_lora2": BFL["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.proj_lora1": BFL["double_blocks.0.img_attn.proj"],
    "double_blocks.0.processor.proj_lora2": BFL["double_blocks.0.txt_attn.proj"],
    "single_blocks.1.processor.qkv_lora": BFL["single_blocks.1.linear1"][:3],
    "single_blocks.1.processor.proj_lora": BFL["single_blocks.1.linear2"],
}
PROCESSORS = {
    "transformer_blocks.0.attn.processor.to_q_lora": [TO_Q],
    "transformer_blocks.0.attn.processor.to_out_lora": ["transformer_blocks.0.attn.to_out.0"],
    "transformer_blocks.0.attn.processor.add_k_proj_lora": ["transformer_blocks.0.attn.add_k_proj"],
}

# program: its names, prefix, whether dots become underscores, the two factors, whether it writes
# alpha
STYLES = {
    "PEFT": (DIFFUSERS, "base_model.model.", False, "lora_A", "lora_B", False),
    "PEFT, adapter's name": (
        DIFFUSERS,
        "base_model.model.",
        False,
        "lora_A.default",
        "lora_B.default",
        False,
    ),
    "PEFT, wrapped twice": (
        DIFFUSERS,
        "base_model.model.transformer._orig_mod.",
        False,
        "lora_A",
        "lora_B",
        False,
    ),
    "diffusers": (DIFFUSERS, "transformer.", False, "lora_A", "lora_B", True),
    "diffusers, down and up": (DIFFUSERS, "transformer.", False, "lora_down", "lora_up", True),
    "diffusers, bare": (DIFFUSERS, "", False, "lora_A", "lora_B", True),
    "older diffusers": (DIFFUSERS, "transformer.", False, "lora.down", "lora.up", False),
    "processors": (PROCESSORS, "transformer.", False, "down", "up", False),
    "ComfyUI, diffusers' names": (
        DIFFUSERS,
        "diffusion_model.",
        False,
        "lora_down",
        "lora_up",
        True,
    ),
    "ComfyUI": (BFL, "diffusion_model.", False, "lora_down", "lora_up", True),
    "ai-toolkit": (BFL, "diffusion_model.", False, "lora_A", "lora_B", False),
    "PEFT of BFL's model": (BFL, "base_model.model.", False, "lora_A", "lora_B", False),
    "kohya": (BFL, "lora_unet_", True, "lora_down", "lora_up", True),
    "kohya, diffusers' names": (DIFFUSERS, "lora_unet_", True, "lora_down", "lora_up", True),
    "kohya, one underscore more": (
        {f"{name}_": [name] for name in DIFFUSERS},
        "lora_unet_",
        True,
        "lora_down",
        "lora_up",
        False,
    ),
    "OneTrainer": (DIFFUSERS, "lora_transformer_", True, "lora_down", "lora_up", True),
    "LyCORIS": (DIFFUSERS, "lycoris_", True, "lora_down", "lora_up", True),
    "XLabs": (XLABS, "", False, "down", "up", False),
}


def _file_of(style, alpha):
    """(the file's tensors, what it adds to each linear of the tiny transformer)."""
    names, prefix, flat, down, up, has_alpha = STYLES[style]
    g = torch.Generator().manual_seed(3)
    transformer = tiny_transformer()
    state, deltas = {}, {}
    for name, modules in names.items():
        linears = [transformer.get_submodule(module) for module in modules]
        sizes = [linear.out_features for linear in linears]
        a = torch.randn(RANK, linears[0].in_features, generator=g)
        b = torch.randn(sum(sizes), RANK, generator=g)
        delta = (alpha / RANK if has_alpha else 1) * b @ a
        if name == "final_layer.adaLN_modulation.1":
            shift, scale = delta.chunk(2)
            delta = torch.cat([scale, shift])
        deltas |= dict(zip(modules, delta.split(sizes), strict=True))
        at = prefix + (name.replace(".", "_") if flat else name)
        state |= {f"{at}.{down}.weight": a, f"{at}.{up}.weight": b}
        if has_alpha:
            state[f"{at}.alpha"] = torch.tensor(alpha)
    return state, deltas


@pytest.mark.parametrize("style", STYLES)
def test_every_linear_in_every_programs_names(tmp_path, style):
    state, deltas = _file_of(style, alpha=3.0)
    lora = read_lora(write(tmp_path / "x.safetensors", state))
    assert lora.notes == ()
    assert lora.ranks == dict.fromkeys(deltas, RANK)
    transformer = tiny_transformer()
    load_lora(transformer, lora)
    layers = lora_layers(transformer)
    assert layers.keys() == deltas.keys()
    for name, layer in layers.items():
        # two fp32 products of rank 2 in another order
        torch.testing.assert_close(
            layer.get_delta_weight("default"), deltas[name], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("style", ["kohya", "ComfyUI", "XLabs"])
def test_diffusers_converter_reads_the_same(tmp_path, style, alpha):
    state, _ = _file_of(style, alpha)
    # its converter splits linear1 of FLUX.1's own sizes only, and loses the final layer's alpha
    state = {
        k: v
        for k, v in state.items()
        if not any(part in k for part in ("linear1", "qkv_lora.", "final_layer"))
    }
    if style == "kohya":
        # q, k and v trained apart, in one pair: block-diagonal, which the converter takes apart
        blocks = torch.block_diag(*torch.ones(3, 32, 1))
        at = "lora_unet_double_blocks_0_img_attn_qkv"
        state |= {
            f"{at}.lora_down.weight": torch.randn(
                3, 32, generator=torch.Generator().manual_seed(6)
            ),
            f"{at}.lora_up.weight": blocks,
        }
    got = products(read_lora(write(tmp_path / "x.safetensors", state)))
    theirs = FluxLoraLoaderMixin.lora_state_dict({k: v.clone() for k, v in state.items()})
    expected = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): theirs[
            key.replace("lora_A", "lora_B")
        ]
        @ theirs[key]
        for key in theirs
        if "lora_A" in key
    }
    assert got.keys() == expected.keys()
    for name, product in expected.items():
        torch.testing.assert_close(got[name], product, rtol=1e-5, atol=1e-5)


def test_fused_single_block_of_the_real_size(tmp_path):
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 3072, generator=g), torch.randn(21504, 2, generator=g)
    at = "lora_unet_single_blocks_37_linear1"
    lora = read_lora(
        write(tmp_path / "x.safetensors", {f"{at}.lora_down.weight": a, f"{at}.lora_up.weight": b})
    )
    block = "single_transformer_blocks.37"
    assert lora.targets == [
        f"{block}.attn.to_q",
        f"{block}.attn.to_k",
        f"{block}.attn.to_v",
        f"{block}.proj_mlp",
    ]
    assert torch.equal(lora.state[f"{block}.attn.to_k.lora_B.weight"], b[3072:6144])
    assert torch.equal(lora.state[f"{block}.proj_mlp.lora_B.weight"], b[9216:])
    assert torch.equal(lora.state[f"{block}.proj_mlp.lora_A.weight"], a)


def test_styles_and_ranks_may_be_mixed_in_one_file(tmp_path):
    state = pairs() | pairs(
        "double_blocks_1_img_attn_proj", "lora_unet_", 3, "lora_down", "lora_up"
    )
    lora = read_lora(write(tmp_path / "x.safetensors", state))
    assert lora.ranks == {TO_Q: 4, "transformer_blocks.1.attn.to_out.0": 3}


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ],
)
@pytest.mark.parametrize("style", ["diffusers", "kohya", "OneTrainer"])
def test_text_encoders_are_left_out_with_one_line(tmp_path, style, prefix):
    state, deltas = _file_of(style, 1.0)
    # no pair needs to be whole there, and none to be plain LoRA
    text = {
        f"{prefix}{part}": torch.ones(2, 2)
        for part in (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")
    }
    lora = read_lora(write(tmp_path / "x.safetensors", state | text))
    assert lora.ranks.keys() == deltas.keys()
    assert len(lora.notes) == 1
    assert f"4 tensors of text encoders are left out ({prefix}.alpha" in lora.notes[0]
    with pytest.raises(ValueError, match=r"y\.safetensors: holds adapters of text encoders only"):
        read_lora(write(tmp_path / "y.safetensors", text))


def test_leftovers_without_effect_are_left_out_with_one_line(tmp_path):
    leftovers = {
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.diff": torch.zeros(8),
        f"transformer.{TO_Q}.diff_b": torch.zeros(32),
        f"transformer.{TO_Q}.lora_B.bias": torch.zeros(32),
        # a pair of which one factor is zero
        "transformer.position_embedding.lora_A.weight": torch.ones(4, 8),
        "transformer.position_embedding.lora_B.weight": torch.zeros(8, 4),
        "transformer.position_embedding.alpha": torch.tensor(4.0),
    }
    lora = read_lora(write(tmp_path / "x.safetensors", pairs() | leftovers))
    assert lora.targets == [TO_Q]
    assert len(lora.notes) == 1
    assert "6 tensors without effect are left out" in lora.notes[0]
    turned_off = pairs("position_embedding") | {
        "transformer.position_embedding.alpha": torch.tensor(0)
    }
    assert (
        "3 tensors without effect"
        in read_lora(write(tmp_path / "z.safetensors", pairs() | turned_off)).notes[0]
    )
    # one that is zero says nothing about the others
    with pytest.raises(
        ValueError,
        match=r"x\.safetensors: 1 of its tensors have no place .*: transformer\.x\.diff;",
    ):
        read_lora(
            write(
                tmp_path / "x.safetensors",
                pairs() | leftovers | {"transformer.x.diff": torch.ones(1)},
            )
        )
    nonzero = {key: tensor + 1 for key, tensor in leftovers.items()}
    with pytest.raises(
        ValueError,
        match=r"y\.safetensors: 6 of its tensors have no place .*img_attn_norm.* and 3 more",
    ):
        read_lora(write(tmp_path / "y.safetensors", pairs() | nonzero))


def test_a_module_under_two_names_must_have_equal_values(tmp_path):
    a, b = pairs().values()
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    pair = {f"{fused}.lora_down.weight": a, f"{fused}.lora_up.weight": torch.cat([b, b, b])}
    lora = read_lora(write(tmp_path / "x.safetensors", pairs() | pair))
    assert len(lora.targets) == 3
    assert [TO_Q in note and "two names" in note for note in lora.notes] == [True]
    for change in (
        {f"{fused}.lora_up.weight": torch.cat([b, b, b]) + 1},
        {f"{fused}.alpha": torch.tensor(1.0)},
    ):
        with pytest.raises(
            ValueError, match=rf"y\.safetensors: gives {TO_Q} twice.*{fused}.*transformer\.{TO_Q}"
        ):
            read_lora(write(tmp_path / "y.safetensors", pairs() | pair | change))


A, B = (f"transformer.{TO_Q}.lora_{x}.weight" for x in "AB")
NOT_A_LORA = {
    "LoKr": (
        {
            f"transformer.{TO_Q}.lokr_w1": torch.ones(2, 2),
            f"transformer.{TO_Q}.lokr_w2": torch.ones(16, 16),
        },
        rf"holds LoKr \({TO_Q}\), which no run of lora_type standard can go on from",
    ),
    "half a LoHa": (
        {"lora_unet_img_in.hada_w1_a": torch.ones(1)},
        r"of a LoHa there is lora_unet_img_in\.hada_w1_a alone, expected hada_w1_a and hada_w1_b",
    ),
    "a Tucker LoKr": ({f"{TO_Q}.lokr_t2": torch.ones(1)}, r"\(Tucker\) LoKr weights \(.*lokr_t2"),
    "PEFT's OFT": ({f"base_model.model.{TO_Q}.oft_R.weight": torch.ones(1)}, "PEFT's OFT weights"),
    "DoRA over columns": (
        pairs() | {f"transformer.{TO_Q}.dora_scale": torch.ones(1, 32)},
        r"to_q\.dora_scale \[1, 32\] divides by the norms of columns",
    ),
    "a magnitude of another size": (
        pairs() | {f"transformer.{TO_Q}.lora_magnitude_vector": torch.ones(31)},
        r"lora_magnitude_vector \[31\] don't fit together",
    ),
    "convolution": (
        pairs() | {f"transformer.{TO_Q}.lora_mid.weight": torch.ones(4, 4)},
        r"Tucker\) LoRA weights .*lora_mid",
    ),
    "a model": (
        {f"{TO_Q}.weight": torch.ones(2, 2)},
        r"no adapter for FLUX.1's transformer; none of its 1 keys .*to_q\.weight",
    ),
    "another model": (
        {"lora_unet_middle_block_0.lora_down.weight": torch.ones(1, 1)},
        "no adapter .*middle_block_0",
    ),
    "no up": ({A: torch.ones(4, 32)}, rf"of a LoRA there is {A} alone"),
    "no down": ({B: torch.ones(32, 4)}, rf"of a LoRA there is {B} alone"),
    "no up beside a whole pair": (
        pairs() | {"lora_unet_img_in.lora_down.weight": torch.ones(4, 8)},
        r"there is lora_unet_img_in\.lora_down\.weight alone",
    ),
    "ranks": (
        pairs() | {B: torch.ones(32, 3)},
        rf"{TO_Q}: lora_A.weight \[4, 32\], lora_B.weight \[32, 3\] don't fit together; expected "
        r"\[r, i\], \[o, r\] of one LoRA",
    ),
    "swapped shapes": ({A: torch.ones(32, 4), B: torch.ones(4, 24)}, "don't fit together"),
    "rank 0": ({A: torch.ones(0, 32), B: torch.ones(32, 0)}, "don't fit together"),
    "convolution's shape": (
        {A: torch.ones(4, 32, 1, 1), B: torch.ones(32, 4, 1, 1)},
        "don't fit together",
    ),
    "integers": (
        pairs() | {A: torch.ones(4, 32, dtype=torch.int8)},
        rf"{A} holds I8, expected one of F64",
    ),
    "a key without a module": (
        pairs() | {"transformer.lora_extra": torch.ones(1)},
        r"1 of its tensors .*: transformer\.lora_extra",
    ),
    "a second adapter": (
        {
            k.replace("weight", f"{name}.weight"): v
            for name in ("one", "two")
            for k, v in pairs().items()
        },
        r"2 of its tensors .*to_q\.lora_A\.two\.weight",
    ),
    "upper case": (
        pairs() | {A.upper(): torch.ones(4, 32)},
        r"1 of its tensors .*TRANSFORMER_BLOCKS\.0",
    ),
    "an alpha alone": (
        pairs() | {"transformer.proj_out.alpha": torch.tensor(1.0)},
        r"1 of its tensors .*: transformer\.proj_out",
    ),
    "a bias": (
        pairs() | {f"transformer.{TO_Q}.lora_B.bias": torch.ones(32)},
        r"1 of its tensors .*lora_B\.bias",
    ),
    "no such linear": (
        pairs() | pairs("transformer_blocks.0.attn.to_z"),
        r"2 of its tensors .*to_z\.lora_A\.weight",
    ),
    "fused rows": (
        pairs("img_attn_qkv", "lora_unet_double_blocks_0_", 4, "lora_down", "lora_up"),
        "has 32 rows, which can't",
    ),
    "several alphas": (
        pairs() | {f"transformer.{TO_Q}.alpha": torch.ones(3)},
        r"to_q\.alpha: expected one number.*\[3\]",
    ),
    "infinite alpha": (
        pairs() | {f"transformer.{TO_Q}.alpha": torch.tensor(torch.inf)},
        "to_q.alpha's 1 values aren't finite",
    ),
    "NaN": (
        pairs() | {B: torch.full((32, 4), torch.nan)},
        rf"128 of {B}'s 128 values aren't finite",
    ),
}


@pytest.mark.parametrize("case", NOT_A_LORA)
def test_what_is_no_lora_is_refused_by_name(tmp_path, case):
    state, message = NOT_A_LORA[case]
    with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
        read_lora(write(tmp_path / "bad.safetensors", state))
