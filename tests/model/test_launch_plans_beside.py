"""Launch plans where products read more than a linear's own tensors: both streams of a double
block at once, adapters beside the weights, transposed copies of codes, tensor descriptors.

All of it bit for bit against blocks that run as they are.
"""

import functools

import pytest
import torch
from torch import nn

from augmented_cases import augmenting
from fluxfast.model import fused_double
from fluxfast.model.launch_plans import LaunchPlans
from fluxfast.model.room import make_room_for_adapters
from fluxfast.model.stored_codes import keep_transposed, transposed_copies
from fluxfast.ops.linear import transposed_codes
from fluxfast_kernels import matmul, persistent_matmul
from plan_cases import CALLS, block_of, decode_by_kernels, make_model, replays, same, step
from support import in_interpreter

pytestmark = in_interpreter
both_kinds = pytest.mark.parametrize("kind", ["double", "single"])


@pytest.mark.parametrize("batch", [1, 2])
def test_both_streams_in_one_launch(batch, monkeypatch):
    pairs = []

    class Spied(fused_double.LinearPair):
        def __init__(self, *args):
            pairs.append(self)
            super().__init__(*args)

    monkeypatch.setattr(fused_double, "LinearPair", Spied)
    replays("double", of=functools.partial(step, batch=batch), policy="full")
    # four groups in two directions, of three calls that ran and the twin's
    assert len(pairs) == 4 * 2 * 4


# adapters beside the weights


def with_room(model):
    make_room_for_adapters(model.blocks)


@both_kinds
@pytest.mark.parametrize("policy", ["none", "full"])
def test_adapters_beside_weights(kind, policy):
    with augmenting() as taken:
        replays(kind, prepare=with_room, policy=policy)
    assert {"forward", "backward"} <= set(taken)


def test_adapters_beside_weights_that_are_decoded(monkeypatch):
    decode_by_kernels(monkeypatch)
    with augmenting() as taken:
        replays("single", storage="int4", policy="full")
    assert {"forward", "backward"} <= set(taken)


def pair_of_models(plans, prepare=with_room, **options):
    models = [make_model(p, **options) for p in (plans, None)]
    for model in models:
        prepare(model)
    return models


def test_blocks_that_share_a_plan_have_adapters_of_their_own():
    plans = LaunchPlans()
    with augmenting():
        mine, plain = pair_of_models(plans, layers=2, policy="full")
        for seed in range(2):
            for a, e in zip(
                mine.single_transformer_blocks, plain.single_transformer_blocks, strict=True
            ):
                same(step(a, seed), step(e, seed))
    assert plans.replayed == 2 * (4 - CALLS + 1) and not plans.reasons
    assert len(plans.launches) == 2


def new_values(model):
    """As an optimiser writes them: by an address, which leaves no trace."""
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(-2)


def new_memory(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.clone() * 3


def room_elsewhere(model):
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.clone()
    with_room(model)


def no_room(model):
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.clone()


def half_adapters(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.to(torch.bfloat16)
            module.lora_B.to(torch.bfloat16)


def more_ranks(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data, b.data = torch.cat([a.data, a.data]), torch.cat([b.data, b.data], 1)


CHANGES = [new_values, new_memory, room_elsewhere, no_room, half_adapters, more_ranks]


@pytest.fixture
def twins():
    """A single block that runs by plans, and one that runs without, both with room."""
    plans = LaunchPlans()
    with augmenting():
        models = pair_of_models(plans, policy="full")
        for seed in range(CALLS):
            step(block_of(models[0], "single"), seed)
        assert plans.replayed == 2
        yield models
    assert plans.off is None and not plans.reasons


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps(twins, change):
    for model in twins:
        change(model)
    for seed in (8, 9):
        same(*(step(block_of(model, "single"), seed) for model in twins))


@pytest.mark.parametrize("change", [room_elsewhere, no_room])
def test_a_change_between_forward_and_backward(twins, change):
    same(*(step(block_of(m, "single"), 8, between=functools.partial(change, m)) for m in twins))


def test_a_room_that_is_made_later():
    plans = LaunchPlans()
    with augmenting() as taken:
        models = pair_of_models(plans, prepare=lambda model: None, policy="full")
        mine, plain = (block_of(model, "single") for model in models)
        for seed in range(CALLS):
            step(mine, seed)
        assert plans.replayed == 2 and not taken
        for model in models:
            with_room(model)
        same(step(mine, 8), step(plain, 8))
        assert taken


def test_another_forward_before_a_backward(twins):
    """The weights hold the adapters of another call when backward comes."""

    def with_a_call_between(block):
        lora = block.proj_out.lora_A
        own = lora["default"].weight

        def forward_of_another():
            lora["default"].weight = nn.Parameter(own.detach() * 5)
            with torch.no_grad():
                step(block, 3)
            lora["default"].weight = own

        return step(block, 8, between=forward_of_another)

    made, expected = (with_a_call_between(block_of(model, "single")) for model in twins)
    same(made, expected)
    # the adapters that forward had
    same(made, step(block_of(twins[1], "single"), 8))


# transposed copies of codes


def with_copies(model):
    for block in model.blocks:
        keep_transposed(block.linear_groups(), "int8")


def without_copies(model):
    for block in model.blocks:
        keep_transposed(block.linear_groups(), None)


def copies_elsewhere(model):
    without_copies(model)
    with_copies(model)


def copies_apart(model):
    """No product can take those of a group as one."""
    for copy, codes in copies_and_codes(model):
        transposed_codes.remember(codes, copy.clone())


def copies_and_codes(model):
    parts = [m.packed().parts["packed"] for m in model.modules() if hasattr(m, "packed")]
    return [(copy, q) for q in parts if (copy := transposed_codes.copy_of(q)) is not None]


@pytest.fixture
def on_stored_codes(monkeypatch):
    decode_by_kernels(monkeypatch)
    return {"storage": "int8", "compute": "int8", "policy": "full"}


def test_transposed_copies(on_stored_codes):
    replays("double", prepare=with_copies, **on_stored_codes)


def test_copies_that_come_and_go(on_stored_codes):
    plans = LaunchPlans()
    models = pair_of_models(plans, with_copies, **on_stored_codes)
    mine, plain = (block_of(model, "single") for model in models)
    for seed in range(CALLS):
        step(mine, seed)
    assert plans.replayed == 2
    for i, change in enumerate([without_copies, with_copies, copies_elsewhere, copies_apart]):
        for model in models:
            change(model)
        groups = mine.linear_groups()
        assert bool(transposed_copies(groups, "int8")) == (change is not without_copies)
        same(step(mine, 10 + i), step(plain, 10 + i))
    # and between a forward and its backward
    for i, change in enumerate([without_copies, with_copies]):
        same(
            *(step(block_of(m, "single"), i, between=functools.partial(change, m)) for m in models)
        )
    assert plans.off is None and not plans.reasons


# tensor descriptors


@pytest.fixture
def persistent(monkeypatch, on_stored_codes):
    """Products of codes are those of sm_90."""
    monkeypatch.setattr(matmul, "arch_key", lambda device: "sm_90")
    return on_stored_codes


def test_persistent_products(persistent, monkeypatch):
    launched = []
    launch = persistent_matmul.launch
    monkeypatch.setattr(
        persistent_matmul, "launch", lambda *args, **kw: (launched.append(1), launch(*args, **kw))
    )
    replays("double", prepare=with_copies, **persistent)
    assert launched


def test_addresses_that_a_descriptor_can_not_have(persistent, monkeypatch):
    plans = LaunchPlans()
    models = pair_of_models(plans, with_copies, **persistent)
    mine, plain = (block_of(model, "double") for model in models)
    for seed in range(CALLS):
        step(mine, seed)
    assert plans.replayed == 2
    # as if the weights of text and image lay too far from each other
    monkeypatch.setattr(persistent_matmul, "FARTHEST", 1)
    same(step(mine, 8), step(plain, 8))
    assert plans.replayed == 2 and plans.off is None
