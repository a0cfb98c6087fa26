"""Blocks whose products take weight and adapters as one matrix, as on Hopper: all of a block's
kernels in Triton's interpreter, against the composed path in fp64, whose own tests compare it with
diffusers.
"""

import pytest
import torch
from peft import LoraConfig

from augmented_cases import augmenting
from block_cases import EVERYTHING, MODULATION, block_of, inputs, make_model, run
from fluxfast.model import tape
from fluxfast.model.launch_plans import LaunchPlans
from fluxfast.model.room import make_room_for_adapters
from fluxfast.ops.linear import augmented
from support import in_interpreter, randomise, relative_error

pytestmark = in_interpreter
# the same products and sums in another order; fp32 rounds at 6e-8, through some twenty ops and sums
# over 128 numbers
FP32 = 2e-5
both_kinds = pytest.mark.parametrize("kind", ["double", "single"])
# products with augmented weights, by direction: in a double block q, k and v, and both of the MLP's
# linears, each for text and image; the linear after attention is fused. In a single block both
# products. Backward computes the last product of neither again
PRODUCTS = {"double": (6, 4), "single": (2, 1)}


def check(model, kind, expected, tolerance=FP32, **choices):
    actual = run(model, kind, torch.float32, impl="triton", **choices)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance


def check_case(kind, *, batch=1, policy="full", **case):
    """A model with room for its adapters against the composed path in fp64; the products."""
    expected = run(
        make_model(dtype=torch.float64, **case), kind, torch.float64, composed=True, batch=batch
    )
    model = make_model(**case)
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        check(model, kind, expected, batch=batch, policy=policy)
    return taken


@both_kinds
@pytest.mark.parametrize("policy", tape.POLICIES)
@pytest.mark.parametrize(("rank", "batch"), [(5, 1), (8, 2)])
def test_outputs_and_every_gradient(kind, policy, rank, batch):
    taken = check_case(kind, rank=rank, batch=batch, policy=policy)
    products, again = PRODUCTS[kind]
    assert taken.count("backward") == products
    assert taken.count("forward") == products + (0 if policy == "none" else again)


@both_kinds
@pytest.mark.parametrize(
    "targets", [["to_k"], ["ff.net.2", "proj_out"], [*EVERYTHING, *MODULATION]]
)
def test_whatever_carries_an_adapter(kind, targets):
    assert check_case(kind, targets=targets)


def test_streams_with_room_for_different_ranks():
    """As after adapters of the text alone that had more ranks: the streams are apart."""
    expected = run(make_model(dtype=torch.float64), "double", torch.float64, composed=True)
    model = make_model()
    weight = block_of(model, "double").ff_context.net[0].proj.base_layer.weight
    (weight.data,) = augmented.make_room([weight], 40)
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        check(model, "double", expected, policy="full")
    assert taken.count("backward") == PRODUCTS["double"][0]


def two_adapters(dtype):
    """Some linears have two adapters, of different ranks, some one, and some none."""
    model = make_model(["to_q", "to_v", "proj_mlp", "ff.net.2"], rank=3)
    model.add_adapter(LoraConfig(r=6, target_modules=["to_v", "proj_out", "ff.net.2"]), "other")
    model.set_adapter(["default", "other"])
    randomise(model)
    return model.to(dtype).train()


@both_kinds
def test_adapters_of_many_ranks(kind):
    expected = run(two_adapters(torch.float64), kind, torch.float64, composed=True)
    model = two_adapters(torch.float32)
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        check(model, kind, expected, policy="full")
    assert "forward" in taken and "backward" in taken


@both_kinds
@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_weights_that_are_decoded(kind, format):
    model = make_model(format=format)
    # against our own kernel's product of the same weights: how well a format stores them is tested
    # elsewhere
    expected = run(model, kind, torch.float32, impl="triton", policy="full")
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        check(model, kind, expected, policy="full")
    assert taken.count("backward") == PRODUCTS[kind][0]


@both_kinds
def test_dropout(kind):
    model = make_model(dropout=0.4)
    expected = run(model, kind, torch.float32, impl="triton", policy="full")
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        check(model, kind, expected, policy="full")
    # each adapter's part of dx has a mask of its own, which no GEMM applies
    assert "forward" in taken and "backward" not in taken


@both_kinds
@pytest.mark.parametrize("gradients", [True, False])
def test_backward_reads_the_adapters_of_its_forward(kind, gradients):
    """The forward of another adapter comes between a forward and its backward."""
    model = make_model()
    model.add_adapter(LoraConfig(r=3, target_modules=EVERYTHING), "other")
    randomise(model)
    block = block_of(model, kind)
    block.impl, block.policy = "triton", "full"
    img, txt, vec, pe = inputs(model, torch.float32, 1)
    trained = [p for name, p in block.named_parameters() if ".default." in name]

    def forward(adapter):
        model.set_adapter(adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return block(img, txt, vec, pe)[1].square().mean()

    expected = torch.autograd.grad(forward("default"), trained)
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        loss = forward("default")
        with torch.set_grad_enabled(gradients):
            forward("other")
        actual = torch.autograd.grad(loss, trained)
    assert "backward" in taken
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < FP32


@both_kinds
@pytest.mark.parametrize("format", [None, "nf4"])
def test_launch_plans_leave_them_alone(kind, format):
    """What is copied beside the weights depends on addresses, which are no part of a plan."""
    model = make_model(format=format)
    plans = LaunchPlans()
    with augmenting() as taken:
        make_room_for_adapters(model.blocks)
        for _ in range(4):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.mul_(0.9)
            expected = run(model, kind, torch.float32, composed=True, impl="ref", launch_plans=None)
            check(model, kind, expected, policy="full", launch_plans=plans)
    assert taken and plans.replayed == 0 and plans.off is None
