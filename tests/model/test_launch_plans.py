"""Blocks that run by launch plans against blocks that run as they are, bit for bit.

What the calls are is in `plan_cases`.
"""

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast.memory.engine import Engine
from fluxfast.memory.stream import BlockStream
from fluxfast.model import launch_plans
from fluxfast.model.launch_plans import LaunchPlans
from fluxfast.model.launch_replay import LaunchPlan
from fluxfast.model.rope import rope_tables
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from plan_cases import CALLS, TINY, block_of, decode_by_kernels, make_model, replays, same, step
from support import in_interpreter

pytestmark = in_interpreter


@pytest.mark.parametrize(
    ("kind", "policy"), [("double", "none"), ("single", "selective"), ("single", "full")]
)
def test_every_policy(kind, policy):
    replays(kind, policy=policy)


@pytest.mark.parametrize(
    ("kind", "storage", "compute"),
    [("double", "int8", "int8"), ("single", "nf4", "int8")],
)
def test_a_quantised_base(kind, storage, compute, monkeypatch):
    decode_by_kernels(monkeypatch)
    replays(kind, storage=storage, compute=compute, policy="full")


def test_routed_tokens_have_other_positions_each_time():
    def routed(block, seed):
        g = torch.Generator().manual_seed(seed)
        return step(block, seed, index=torch.randperm(3, generator=g)[None])

    replays("single", of=routed)


def test_dropout_draws_a_mask_each_time():
    plans = LaunchPlans()
    mine, plain = (block_of(make_model(p), "single") for p in (plans, None))
    for block in (mine, plain):
        for module in block.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(0.5)
    for seed in range(CALLS + 1):
        same(step(mine, seed), step(plain, seed))
    assert plans.replayed == 4 and not plans.reasons
    # the same input, another seed
    one, other = (step_with(mine, seed) for seed in (1, 2))
    assert not torch.equal(one, other)


def step_with(block, seed):
    x, mod = torch.ones(1, 3, 16), torch.ones(1, 48)
    txt = x[:, :1] if not hasattr(block, "proj_mlp") else None
    mods = (mod,) if txt is None else (torch.ones(1, 96),) * 2
    pe = rope_tables(torch.zeros(3 if txt is None else 4, 3), TINY["axes_dims_rope"])
    torch.manual_seed(seed)
    out = block(x, txt, mods, pe)
    return out if txt is None else out[1]


def test_streamed_weights_are_read_where_they_are():
    """In a ring of two slots, a block's weights are somewhere else at each visit."""
    plans = LaunchPlans()
    mine, plain = (
        make_model(p, "int8", compute="int8", policy="full", layers=4) for p in (plans, None)
    )
    singles = mine.single_transformer_blocks
    stream = BlockStream(singles, Engine(torch.device("cpu")))
    for seed in range(2):
        stream.begin()
        for a, e in zip(singles, plain.single_transformer_blocks, strict=True):
            same(step(a, seed), step(e, seed))
    assert plans.off is None and not plans.reasons
    # all of them share a plan
    assert len(plans.launches) == 2 and plans.replayed == 2 * (2 * len(singles) - CALLS + 1)
    stream.close()


# what may change between two calls


@pytest.fixture(scope="module")
def known():
    """Plans that replay the single block of `make_model`, and such a block that runs without."""
    plans = LaunchPlans()
    block = block_of(make_model(plans), "single")
    for seed in range(CALLS):
        step(block, seed)
    assert plans.replayed == 2
    return plans


def loras(block):
    return [module for module in block.modules() if hasattr(module, "lora_A")]


def other_scale(block):
    loras(block)[1].scaling["default"] *= 2


def dropout(block):
    loras(block)[1].lora_dropout["default"] = nn.Dropout(0.5)


def adapters_off(block):
    for module in loras(block):
        module.enable_adapters(False)


def one_adapter_off(block):
    loras(block)[0].enable_adapters(False)


def other_memory(block):
    for p in block.parameters():
        p.data = p.data.clone() * 2


def written_in_place(block):
    for p in block.parameters():
        p.data.mul_(1.5)


def fewer_ranks(block):
    for module in loras(block):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        # the very address of before
        a.data, b.data = a.data[:2], b.data[:, :2].clone()


def transposed(block):
    weight = block.attn.to_k.base_layer.weight
    weight.data = weight.data.T.clone().T


def unaligned(block):
    weight = block.proj_out.base_layer.weight
    weight.data = torch.cat([weight.data.flatten()[:1], weight.data.flatten()])[1:].view_as(weight)


def apart(block):
    for linear in (block.attn.to_q, block.attn.to_k):
        linear.base_layer.weight.data = linear.base_layer.weight.data.clone()


def exchanged(block):
    """q's and k's weights lie side by side, but the other way round."""
    q, k = (linear.base_layer.weight for linear in (block.attn.to_q, block.attn.to_k))
    q.data, k.data = k.data, q.data


def tied(block):
    block.attn.to_k.lora_A["default"].weight = block.attn.to_q.lora_A["default"].weight


def epsilon(block):
    block.norm.norm.eps = 0.5


def norm_weights(block):
    block.attn.norm_q.weight.data.mul_(3)


def quantised(block):
    base = block.attn.to_v.base_layer
    block.attn.to_v.base_layer = QuantLinear.from_linear(base, FORMATS["int8"])


def hooked(block):
    block.proj_out.register_forward_hook(lambda module, args, out: out * 2)


def loaded(block):
    block.load_state_dict({name: t * 0.5 for name, t in block.state_dict().items()})


def half_adapters(block):
    for module in loras(block):
        module.lora_A.to(torch.bfloat16)
        module.lora_B.to(torch.bfloat16)


CHANGES = [
    other_scale, dropout, adapters_off, one_adapter_off, other_memory, written_in_place,
    fewer_ranks, transposed, unaligned, apart, exchanged, tied, epsilon, norm_weights, quantised,
    hooked, loaded, half_adapters,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_gives_what_it_gives_without_plans(known, change):
    mine, plain = (block_of(make_model(p), "single") for p in (known, None))
    before = known.replayed
    step(mine, 7)
    assert known.replayed == before + 2
    change(mine)
    change(plain)
    for seed in (8, 9):
        same(step(mine, seed), step(plain, seed))
    assert known.off is None


@pytest.mark.parametrize(
    "options",
    [
        {"compute": "int8"},
        {"compute": "int8", "outliers": 2},
        {"policy": "full"},
        {"attention": "ref"},
        {"impl": "ref"},
    ],
)
def test_other_options(known, options):
    mine, plain = (block_of(make_model(p, **options), "single") for p in (known, None))
    same(step(mine, 7), step(plain, 7))
    assert known.off is None


@pytest.mark.parametrize(
    "call",
    [
        {"tokens": 4},
        {"batch": 2},
        {"grad": False},
        {"index": torch.tensor([[2, 0, 1]])},
        {"mask": torch.tensor([True, True, False]).view(1, 1, 1, 3)},
    ],
)
def test_other_calls(known, call):
    mine, plain = (block_of(make_model(p), "single") for p in (known, None))
    same(step(mine, 7, **call), step(plain, 7, **call))
    assert known.off is None


def test_evaluation_after_training(known):
    """A call without gradients keeps nothing, by the same plan of forward."""
    mine, plain = (block_of(make_model(p), "single").eval() for p in (known, None))
    with torch.no_grad():
        same([step_with(mine, 0)], [step_with(plain, 0)])


def test_what_an_operation_is_asked_for_is_seen_by_whoever_watches(known):
    class Watch(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Watch.seen += 1
            return func(*args, **(kwargs or {}))

    block, before = block_of(make_model(known), "single"), known.replayed
    with Watch():
        step(block, 1)
    assert known.replayed == before and Watch.seen > 100


def test_a_plan_that_gives_something_else_turns_plans_off(monkeypatch, caplog):
    plans, replay = LaunchPlans(), LaunchPlan.replay
    monkeypatch.setattr(
        LaunchPlan, "replay", lambda *args: [t if t is None else t * 1.01 for t in replay(*args)]
    )
    mine, plain = (block_of(make_model(p), "single") for p in (plans, None))
    with caplog.at_level(logging.WARNING, "fluxfast"):
        for seed in range(CALLS):
            same(step(mine, seed), step(plain, seed))
    assert plans.replayed == 0 and plans.off is not None
    assert [r.message for r in caplog.records if "launch plans: off" in r.message]


def test_no_room_to_compare_puts_it_off(monkeypatch):
    plans, replay, failing = LaunchPlans(), LaunchPlan.replay, [1, 2]

    def replay_once_there_is_room(*args):
        if failing:
            failing.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replay(*args)

    monkeypatch.setattr(LaunchPlan, "replay", replay_once_there_is_room)
    mine, plain = (block_of(make_model(p), "single") for p in (plans, None))
    for seed in range(CALLS + 1):
        same(step(mine, seed), step(plain, seed))
    assert plans.off is None and plans.replayed == 2


def test_nothing_is_kept_alive():
    """Neither the tensors of a step nor the block: of both, plans know shapes alone."""
    plans = LaunchPlans()
    block = block_of(make_model(plans), "single")
    for seed in range(CALLS):
        made = [weakref.ref(t) for t in step(block, seed)]
    weights = [weakref.ref(p) for p in block.parameters()]
    assert plans.replayed == 2
    del block
    gc.collect()
    assert not any(ref() is not None for ref in (*made, *weights))


def test_a_copied_model_makes_its_own_plans(known):
    model = make_model(known)
    copied = copy.deepcopy(model)
    mine = {block.launch_plans for block in copied.blocks}
    assert len(mine) == 1 and known not in mine
    (plans,) = mine
    assert plans.replayed == 0 and not plans.launches


def test_only_so_many_plans_are_kept(monkeypatch):
    monkeypatch.setattr(launch_plans, "MOST_PLANS", 2)
    plans = LaunchPlans()
    mine, plain = (block_of(make_model(p), "single") for p in (plans, None))
    for seed in range(2):
        for tokens in (2, 3):
            same(step(mine, seed, tokens=tokens), step(plain, seed, tokens=tokens))
    assert len(plans.launches) <= 2 and plans.replayed == 0
