"""Which linears a `lycoris_config` names, beside lycoris-lora's own network."""

import pytest
from torch import nn

from fluxfast import FluxTransformer
from fluxfast.adapters.lycoris_targets import match_lycoris
from small_flux import small_flux
from support import SMALL

BOTH = ["Attention", "FeedForward"]
# (the targets, the library's other arguments)
CONFIGS = {
    "SimpleTuner's example": (
        {
            "target_module": BOTH,
            "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
        },
        {"linear_dim": None, "full_matrix": True, "linear_alpha": 1, "factor": 16},
    ),
    "no targets": ({}, {}),
    "a rank for each class": (
        {
            "target_module": ["FluxAttention"],
            "module_algo_map": {"FeedForward": {"dim": 2, "alpha": 7, "algo": "loha"}},
        },
        {"factor": 4},
    ),
    "blocks, and a class within": (
        {
            "target_module": ["FluxSingleTransformerBlock"],
            "module_algo_map": {
                "FluxTransformerBlock": {"algo": "locon", "dim": 3},
                "FeedForward": {"dim": 5},
                "Linear": {"algo": "lokr", "factor": 2},
            },
        },
        {},
    ),
    "names by regular expressions": (
        {
            "target_module": [],
            "target_name": [r"transformer_blocks\.\d+\.attn\.to_[qk]", "proj_out"],
            "name_algo_map": {
                r".*ff\.net\.2$": {"algo": "lora", "dim": 6},
                r"single_transformer_blocks\.[02]\.proj_mlp": {"factor": 3},
            },
        },
        {},
    ),
    "names with wildcards": (
        {
            "target_module": ["FeedForward"],
            "use_fnmatch": True,
            "target_name": ["*attn.to_?", "*.proj_out"],
            "name_algo_map": {"single*to_v": {"decompose_both": True}, "*proj_out": {"dim": 1}},
            "exclude_name": ["*ff_context*", "transformer_blocks.1.attn.to_k"],
        },
        {"decompose_both": False, "dora_wd": True},
    ),
    "names beside classes": (
        {
            "target_module": ["FluxAttention", "Linear"],
            "target_name": ["transformer_blocks.0.attn$", "x_embedder"],
            "exclude_name": [r"time_text_embed", "norm_out"],
            "name_algo_map": {"context_embedder": {"algo": "glora"}},
            "module_algo_map": {"Linear": {"factor": 2, "unbalanced_factorization": True}},
        },
        {},
    ),
    "the whole transformer": (
        {"target_module": ["FluxTransformer2DModel"], "lora_prefix": "mine"},
        {"algo": "lora", "preset": "attn-mlp"},
    ),
    "the library's preset of ia3": (
        {"target_module": [], "target_name": [".*to_k", ".*ff.net.2"]},
        {"algo": "ia3", "preset": "ia3"},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_algorithms_and_shapes_are_the_librarys(name, lycoris_config, library_network):
    targets, arguments = CONFIGS[name]
    config = lycoris_config(apply_preset=targets, **arguments)
    model = FluxTransformer.__base__(**SMALL)
    found = match_lycoris(model, config).modules
    network = library_network(model, config)
    linears = {id(module): name for name, module in model.named_modules()}
    theirs = {linears[id(lora.org_module[0])]: lora for lora in network.loras}
    assert found.keys() == theirs.keys()
    assert [*found] == [n for n, _ in model.named_modules() if n in found]
    kind = pytest.importorskip("fluxfast.adapters.lycoris").LycorisKind()
    for module, options in found.items():
        linear, lora = model.get_submodule(module), theirs[module]
        algo = {"LoConModule": ("lora", "locon"), "LohaModule": ("loha",), "IA3Module": ("ia3",)}
        algo |= {"LokrModule": ("lokr",), "GLoRAModule": ("glora",)}
        assert options.algo in algo[type(lora).__name__]
        shapes = {name: tuple(p.shape) for name, p in lora.named_parameters()}
        assert kind.shapes(linear.out_features, linear.in_features, options) == shapes


def test_our_transformer_has_diffusers_classes(lycoris_config):
    theirs, ours = FluxTransformer.__base__(**SMALL), small_flux("int8", guidance_embeds=False)
    assert type(ours.transformer_blocks[0].attn.to_q) is not nn.Linear
    for classes in (BOTH, ["FluxTransformerBlock"], ["Linear"], ["FluxTransformer2DModel"]):
        config = lycoris_config(apply_preset={"target_module": classes})
        assert match_lycoris(ours, config).modules == match_lycoris(theirs, config).modules


def test_targets_that_name_nothing_are_told(lycoris_config):
    model = FluxTransformer(**SMALL)
    targets = {
        "target_module": ["Attention", "CrossAttention"],
        "target_name": ["x_embedder", "nothing"],
        "name_algo_map": {"proj_out": {"dim": 2}},
        "module_algo_map": {"Absent": {"dim": 2}},
    }
    found = match_lycoris(model, lycoris_config(apply_preset=targets))
    assert found.unmatched == ["Absent", "CrossAttention", "nothing"]
    assert found.modules["proj_out"].dim == 2 and found.modules["x_embedder"].dim == 4
    with pytest.raises(
        ValueError, match=r"matches no linear of .*: its targets are Absent, nothing"
    ):
        match_lycoris(
            model,
            lycoris_config(
                apply_preset={
                    "target_module": ["Absent"],
                    "target_name": ["nothing", "x_embedder"],
                    "exclude_name": ["x_embedder"],
                }
            ),
        )
