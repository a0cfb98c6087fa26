import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_flux import tiny_transformer
from torch import nn

from fluxfast.adapters.kind import trainable_parameters
from fluxfast.adapters.lora import add_lora
from fluxfast.adapters.presets import FUSED_PROJECTIONS, PRESETS, match_targets, preset_targets

# modules and rank-16 parameters on FLUX.1's 19 + 38 blocks
GOLDEN = {
    "all": (266, 26_148_864),
    "context": (76, 7_471_104),
    "context+ffs": (114, 16_809_984),
    "all+ffs": (419, 65_422_336),
    "all+ffs+embedder": (420, 65_472_512),
    "ai-toolkit": (495, 85_967_872),
    "tiny": (2, 589_824),
    "nano": (1, 294_912),
    "mmdit": (190, 18_677_760),
    "all+ffs+embedder+controlnet": (190, 18_677_760),
}


def test_every_preset_has_a_golden_value():
    assert GOLDEN.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_preset_on_flux1(name):
    modules, parameters = GOLDEN[name]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        matched = match_targets(transformer, preset_targets(name), optional=FUSED_PROJECTIONS)
        lora = add_lora(transformer, targets=name, rank=16)
    # PEFT's own matching, and ours, which says so beforehand
    assert len(lora) == 2 * modules
    assert sum(p.numel() for p in lora) == parameters
    assert PRESETS[name].modules == modules
    assert [n.rsplit(".lora_", 1)[0] for n in trainable_parameters(transformer)][::2] == matched


def test_last_linear_of_all_is_the_transformers_own():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel()
    assert match_targets(transformer, ["proj_out"])[-1] == "proj_out"
    assert len(match_targets(transformer, ["proj_out"])) == 39


def test_controlnet_and_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="needs a ControlNet"):
        preset_targets("controlnet")
    with pytest.raises(ValueError, match=r"expected one of all, context.*got 'daisy'"):
        preset_targets("daisy")


def test_a_preset_that_matches_nothing_names_its_targets():
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match=r"no module .*single_transformer_blocks\.7\.proj_out"):
        add_lora(transformer, targets="nano", rank=4)
    assert not any("lora" in name for name, _ in transformer.named_modules())


def test_every_entry_of_a_users_list_must_match_a_linear():
    transformer = tiny_transformer()
    with pytest.raises(ValueError, match=r"no module .*: to_qkv, to_Q$"):
        match_targets(transformer, ["to_q", "to_qkv", "to_Q"])
    with pytest.raises(ValueError, match=r"aren't: .*norm1"):
        match_targets(transformer, ["to_q", "norm1"])
    with pytest.raises(ValueError, match=r"no module of Linear: to_qkv"):
        match_targets(nn.Linear(2, 2), ["to_qkv"], optional=["to_qkv"])


def test_a_target_is_a_whole_dotted_suffix():
    transformer = tiny_transformer()
    assert match_targets(transformer, ["transformer_blocks.0.attn.to_q"]) == [
        "transformer_blocks.0.attn.to_q",
    ]
    assert match_targets(transformer, ["attn.to_q", "proj_mlp"]) == [
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.attn.to_q",
    ]
