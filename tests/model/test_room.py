"""Weights that get room for adapters stay what they were to everybody else."""

import copy

import pytest
import torch
from peft import LoraConfig

from augmented_cases import augmenting
from block_cases import EVERYTHING, make_model
from fluxfast import FluxTransformer
from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.memory.stream import stream_blocks
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.room import make_room_for_adapters
from fluxfast.ops.linear import augmented
from support import SMALL, in_interpreter, make_inputs


def bases(model, *names):
    """The frozen weights of linears, by the ends of their names."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.removesuffix(".base_layer").endswith(names)
        and "lora_" not in name
    ]


def with_room(model):
    with augmenting():
        make_room_for_adapters(model.blocks)
    return model


@pytest.fixture
def model():
    return with_room(make_model())


def test_groups_lie_together_and_nothing_else_changes():
    before = make_model()
    parameters = dict(before.named_parameters())
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    model = with_room(before)
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    # rank 3 on each of three linears, rounded up
    (place,) = [augmented.placed(bases(model, "add_q_proj", "add_k_proj", "add_v_proj"), 9)]
    assert place is not None and place.layout.room == 16
    assert augmented.placed(bases(model, "proj_out")[:1], 3) is not None
    # attention's output has no room for what adapters add, so that these weights need none
    assert augmented.placed(bases(model, "to_add_out"), 3) is None


def test_twice_is_as_good_as_once(model):
    places = [p.data_ptr() for p in model.parameters()]
    with_room(model)
    assert [p.data_ptr() for p in model.parameters()] == places
    # not so with more ranks than there is room for
    model.add_adapter(LoraConfig(r=20, target_modules=EVERYTHING), "other")
    model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (ff,) = bases(model, "ff.net.2")
    assert augmented.placed([ff], 23) is None
    with_room(model)
    assert augmented.placed([ff], 23) is not None


def test_only_where_products_read_it():
    model = make_model()
    make_room_for_adapters(model.blocks)
    assert all(p.is_contiguous() for p in model.parameters())
    model = make_model()
    model.set_compute("int8")
    with_room(model)
    assert all(p.is_contiguous() for p in model.parameters())


def test_only_weights_with_an_adapter_get_any():
    model = with_room(make_model(["to_k"]))
    assert augmented.placed(bases(model, "ff.net.2"), 1) is None
    assert bases(model, "ff.net.2")[0].is_contiguous()


def test_streamed_weights_get_none():
    model = make_model(num_layers=2, num_single_layers=2)
    with augmenting():
        make_ready(model, Choices(("full",) * 4, slots=2))
    assert all(p.is_contiguous() for p in model.parameters())


@in_interpreter
def test_streaming_takes_it_away(model):
    model.eval()
    inputs = make_inputs(1, 2, 2)
    with torch.no_grad():
        expected = model(**inputs)[0]
        stream = stream_blocks(model, torch.device("cpu"), slots=2)
        assert all(p.is_contiguous() for p in model.blocks[0].parameters())
        assert torch.equal(model(**inputs)[0], expected)
        stream.close()


def test_packing_again_brings_weights_side_by_side(model):
    pack_groups(model)
    weights = bases(model, "add_q_proj", "add_k_proj", "add_v_proj")
    assert augmented.placed(weights, 9) is not None


def test_a_copy_and_a_cast_have_weights_of_their_own(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.double().parameters())
    assert augmented.placed(bases(model, "ff.net.2"), 3) is None


def test_merging_adapters_changes_the_weights_where_they_are(model):
    (linear,) = [m for n, m in model.named_modules() if n.endswith("blocks.0.proj_out")]
    a, b = (linear.get_submodule(f"lora_{f}").default.weight for f in "AB")
    wanted = linear.base_layer.weight + linear.scaling["default"] * b @ a
    linear.merge()
    assert torch.allclose(linear.base_layer.weight, wanted, atol=1e-6)
    assert augmented.placed([linear.base_layer.weight], 3) is not None
    linear.unmerge()


def test_what_is_saved_is_what_it_was(tmp_path):
    torch.manual_seed(0)
    plain = FluxTransformer(**SMALL)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    # as after an adapter was taken off again
    for block in plain.blocks:
        for modules in block.groups_with_room():
            weights = [module.weight.requires_grad_(False) for module in modules]
            for weight, place in zip(weights, augmented.make_room(weights, 5), strict=True):
                weight.data = place
    plain.save_pretrained(tmp_path)
    loaded = FluxTransformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
