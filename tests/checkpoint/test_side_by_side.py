"""Linears that share an input lie side by side, and nothing else about the model changes."""

import copy

import pytest
import torch
from peft import LoraConfig

from fluxfast import FluxTransformer
from fluxfast.checkpoint.side_by_side import (
    NORMS,
    allocate,
    groups,
    ordered,
    pack_groups,
    side_by_side,
)
from fluxfast.quant import FORMATS
from small_flux import small_flux
from support import SMALL, make_inputs


def make_model(format=None):
    return small_flux(format).eval()


def members(model):
    """The tensors of each group of a model: lists of those that belong side by side."""
    state = model.state_dict()
    return [
        [state[name] for name in group]
        for group in groups(name for name in state if "lora_" not in name)
    ]


def test_groups_of_flux():
    names = list(make_model().state_dict())
    found = groups(names)
    assert [f"transformer_blocks.1.attn.add_{n}_proj.bias" for n in "qkv"] in found
    assert [
        f"single_transformer_blocks.2.{n}.weight"
        for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ] in found
    # two groups of weights and of biases in each double block, one in each single block
    assert len(found) == 2 * 2 * SMALL["num_layers"] + 2 * SMALL["num_single_layers"]
    shuffled = ordered(reversed(names))
    assert sorted(shuffled) == sorted(names)
    assert all(
        shuffled[shuffled.index(group[0]) :][: len(group)] == group for group in groups(shuffled)
    )


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_pack(format):
    model, inputs = make_model(format), make_inputs(1, 3, 4)
    before, expected = copy.deepcopy(model.state_dict()), model(**inputs).sample
    assert not any(map(side_by_side, members(model)))
    identities = [id(parameter) for parameter in model.parameters()]
    pack_groups(model)
    assert members(model) and all(map(side_by_side, members(model)))
    assert [id(parameter) for parameter in model.parameters()] == identities
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(model(**inputs).sample, expected)

    places = [tensor.data_ptr() for tensor in after.values()]
    pack_groups(model)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places


def test_a_view_over_the_group():
    model = make_model()
    pack_groups(model)
    attn = model.transformer_blocks[0].attn
    weights = [attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]
    rows = sum(weight.shape[0] for weight in weights)
    assert torch.equal(
        weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride()), torch.cat(weights)
    )


def test_memory_is_no_more_than_before():
    model = make_model("int4")
    pack_groups(model)
    tensors = model.state_dict().values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == sum(t.nbytes for t in tensors)


def test_saved_and_loaded_again(tmp_path):
    model = make_model()
    pack_groups(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    again = FluxTransformer.from_pretrained(tmp_path)
    assert all(map(side_by_side, members(again)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_under_adapters():
    model = make_model("int8")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_mlp"]))
    pack_groups(model)
    block = model.single_transformer_blocks[0]
    linears = [
        block.attn.to_q.base_layer,
        block.attn.to_k,
        block.attn.to_v.base_layer,
        block.proj_mlp.base_layer,
    ]
    assert side_by_side([linear.weight_packed for linear in linears])
    assert side_by_side([linear.bias for linear in linears])


def test_factors_of_adapters():
    model = make_model()
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "proj_mlp", "add_q_proj"])
    )
    model.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_k", "to_v"]), "second")
    before = copy.deepcopy(model.state_dict())
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    pack_groups(model)
    assert all(
        p is q
        for p, q in zip(
            factors, [p for n, p in model.named_parameters() if "lora_" in n], strict=True
        )
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    block = model.single_transformer_blocks[0]
    for factor in ("lora_A", "lora_B"):
        group = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        assert side_by_side([getattr(linear, factor)["default"].weight for linear in group])
        double = model.transformer_blocks[0].attn
        assert side_by_side(
            [
                getattr(linear, factor)["second"].weight
                for linear in (double.to_q, double.to_k, double.to_v)
            ]
        )


def test_unlike_members_stay():
    model = make_model()
    attn = model.transformer_blocks[0].attn
    attn.to_k.to(torch.float64)
    attn.add_k_proj.bias = None
    attn.add_v_proj = torch.nn.Sequential(attn.add_v_proj)
    attn.norm_k.to(torch.float64)
    places = [t.data_ptr() for t in attn.state_dict().values()]
    pack_groups(model)
    assert [t.data_ptr() for t in attn.state_dict().values()] == places
    norms = [getattr(model.transformer_blocks[1].attn, name).weight for name in NORMS]
    assert side_by_side(norms)
    assert side_by_side(
        [model.transformer_blocks[1].attn.to_q.weight, model.transformer_blocks[1].attn.to_k.weight]
    )


def test_neighbours_by_chance_are_not_side_by_side():
    """Two allocations can touch, but only within one storage may a view span two tensors."""
    whole = torch.zeros(8, 3)
    assert side_by_side([whole[:4], whole[4:]])
    assert not side_by_side([whole[:4], whole[4:].clone()])
    assert not side_by_side([whole[4:], whole[:4]]) and not side_by_side([whole[:4], whole[5:]])
    # torch.from_numpy makes another storage of the same memory
    array = whole.numpy()
    assert not side_by_side([torch.from_numpy(array[:4]), torch.from_numpy(array[4:])])


def test_allocate():
    like = {name: tensor.to("meta") for name, tensor in make_model("nf4").state_dict().items()}
    made = allocate(like, "cpu")
    assert list(made) == list(like)
    assert all(
        made[n].shape == t.shape and made[n].dtype == t.dtype and not made[n].is_meta
        for n, t in like.items()
    )
    assert all(side_by_side([made[name] for name in group]) for group in groups(like))
