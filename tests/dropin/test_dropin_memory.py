"""What trainers do to save memory changes nothing of what an accelerated model computes."""

import copy
import functools
import types

import bitsandbytes
import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from dropin_cases import HOSTS, every_kind, output, single_blocks
from dropin_hosts import FP32, assert_equal, pair, randomise_trained
from host_adapters import KohyaLora, OneTrainerColumnDora, OneTrainerLora
from host_memory import BlockSwap, CheckpointLayer, Conductor, bounce, cpu_offloading
from host_of_sd_scripts import Flux
from torch import nn

import fluxfast
from fluxfast.model.checkpointing import _runs_more, came_from_another_device
from fluxfast.model.linear import read_linear
from support import make_inputs, randomise, relative_error

INPUTS = make_inputs(2, 6, 4, guidance=False)


def blocks_of(model):
    """The double blocks and the single blocks."""
    if isinstance(model, Flux):
        return model.double_blocks, model.single_blocks
    return model.transformer_blocks, model.single_transformer_blocks


def to_float8(linear):
    return linear.to(torch.float8_e4m3fn)


def to_nf4(linear):
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4"
    ).to("cpu")
    made.bias = linear.bias
    return made


def host_with(kind, make=KohyaLora, convert=None):
    """A host with an adapter on each linear of its blocks, in a network of its own."""
    torch.manual_seed(0)
    model = HOSTS[kind]().requires_grad_(False)
    randomise(model)
    network = nn.ModuleList()
    for blocks in blocks_of(model):
        for name, module in list(blocks.named_modules()):
            if type(module) is nn.Linear:
                linear = module if convert is None else convert(module)
                parent, _, child = name.rpartition(".")
                blocks.get_submodule(parent)._modules[child] = linear
                network.append(make(linear))
    # outside of the model, as trainers have it: what moves a block's weights moves none of these
    model.__dict__["network"] = network
    randomise_trained(network)
    return model


def trained(model):
    return dict(model.__dict__["network"].named_parameters())


def by_closure(block):
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)


def by_method(block):
    original = block.forward
    block.forward = types.MethodType(lambda _, *args, **kwargs: original(*args, **kwargs), block)


def by_default(block):
    def forward(*args, _original=block.forward, **kwargs):
        return _original(*args, **kwargs)

    block.forward = forward


def by_partial(block):
    block.forward = functools.partial(lambda call, *a, **k: call(*a, **k), block.forward)


def by_diffusers(block):
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "nothing")


def by_accelerate(block):
    add_hook_to_module(block, AccelerateHook())


def by_layer(block):
    CheckpointLayer(block, reentrant=False)


def by_reentrant_layer(block):
    CheckpointLayer(block, reentrant=True)


WRAPPERS = [
    *(by_closure, by_method, by_default, by_partial, by_diffusers, by_accelerate),
    *(by_layer, by_reentrant_layer),
]


@every_kind
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_from_before_calls_our_forward(kind, wrap):
    theirs, ours = pair(host_with, kind)
    before = output(ours, INPUTS)
    for block in (*blocks_of(ours)[0], *blocks_of(ours)[1]):
        wrap(block)
        # one around another
        by_closure(block)
    report = fluxfast.accelerate(ours, strict=True)
    assert all(block.fused for block in report.blocks)
    assert_equal(theirs, ours, INPUTS, trained=trained)
    assert report.calls("fused") == report.calls() >= len(report.blocks)
    fluxfast.restore(ours)
    counted = report.calls()
    # the host's own arithmetic again, to the bit
    assert torch.equal(output(ours, INPUTS), before) and report.calls() == counted


def test_hooks_that_go_leave_our_forward():
    theirs, ours = pair(host_with, "diffusers")
    block = ours.transformer_blocks[0]
    by_accelerate(block)
    report = fluxfast.accelerate(ours)
    remove_hook_from_module(block)
    assert_equal(theirs, ours, INPUTS, trained=trained)
    assert report.calls("fused") == report.calls() == len(report.blocks)
    fluxfast.restore(ours)
    assert_equal(theirs, ours, INPUTS, trained=trained, tolerance=1e-12)


@pytest.mark.parametrize("convert", [None, to_float8])
@pytest.mark.parametrize("policy", [None, "full", "none"])
@pytest.mark.parametrize("before", [True, False])
def test_blocks_that_trade_places(convert, policy, before):
    theirs, ours = pair(host_with, "bfl", convert=convert)
    if convert is not None:
        # no product takes such weights: the host's own result is that of their values
        for blocks in blocks_of(theirs):
            blocks.float()
    if before:
        fluxfast.accelerate(ours, recompute=policy, strict=True)
    swaps = [BlockSwap(list(single_blocks(ours)), 1), BlockSwap(list(ours.double_blocks), 1)]
    if not before:
        fluxfast.accelerate(ours, recompute=policy, strict=True)
    for _ in range(2):
        assert_equal(theirs, ours, INPUTS, trained=trained)
    # away and back in each of two steps
    assert swaps[0].trades == 4


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_layers_that_come_for_their_turn(kind, reentrant, before):
    theirs, ours = pair(host_with, kind, OneTrainerLora)
    blocks = [block for blocks in blocks_of(ours) for block in blocks]
    if before:
        report = fluxfast.accelerate(ours, strict=True)
    conductor = Conductor(blocks)
    for block in blocks:
        CheckpointLayer(block, reentrant, conductor)
    if not before:
        report = fluxfast.accelerate(ours, strict=True)
    assert_equal(theirs, ours, INPUTS, trained=trained)
    assert report.calls("fused") == report.calls() > 0


@every_kind
def test_linears_that_fetch_their_weight_are_called(kind):
    theirs, ours = pair(host_with, kind)
    for module in ours.__dict__["network"]:
        # below the adapter, as ai-toolkit attaches its manager
        linear = module.org_forward.__self__
        adapted = linear.forward
        bounce(linear)
        module.org_forward, linear.forward = linear.forward, adapted
    report = fluxfast.accelerate(ours)
    with pytest.warns(UserWarning, match="fluxfast: .*ai-toolkit fetches its weight"):
        assert_equal(theirs, ours, INPUTS, trained=trained)
    assert not any(block.fused for block in report.blocks)
    because = "ai-toolkit fetches its weight for the length of a call"
    assert {linear.because for linear in report.linears} == {because}


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("before", [True, False])
def test_diffusers_group_offload(level, before):
    theirs, ours = pair(host_with, "diffusers")
    if before:
        report = fluxfast.accelerate(ours)
    apply_group_offloading(
        ours,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=level,
        **({"num_blocks_per_group": 2} if level == "block_level" else {}),
    )
    if not before:
        report = fluxfast.accelerate(ours)
    assert_equal(theirs, ours, INPUTS, trained=trained)
    # a group of whole blocks is here while they run; a group of one linear is not
    whole = level == "block_level"
    assert report.calls("fused") == (report.calls() if whole else 0)


@every_kind
def test_checkpoints_whose_streams_wait_in_host_memory(kind):
    theirs, ours = pair(host_with, kind)
    report = fluxfast.accelerate(ours, strict=True)
    entry = "_forward" if kind == "bfl" else "forward"
    for blocks in blocks_of(ours):
        for block in blocks:
            offloaded = cpu_offloading(getattr(block, entry))
            block.forward = lambda *args, call=offloaded, **kwargs: call(*args, *kwargs.values())
    assert_equal(theirs, ours, INPUTS, trained=trained)
    assert report.calls("fused") == report.calls() > 0


def test_which_wrappers_only_checkpoint():
    model = host_with("diffusers")
    other, block = model.transformer_blocks
    assert not _runs_more(block)
    # it may have a conductor, which moves weights
    CheckpointLayer(other, reentrant=False)
    assert _runs_more(other)
    other.forward = Checkpoints(other).forward
    assert _runs_more(other)
    block.forward = Checkpoints(block).forward
    assert not _runs_more(block)
    block.register_full_backward_hook(lambda *_: None)
    assert not _runs_more(block)
    block.register_forward_hook(lambda *_: None)
    assert _runs_more(block)


class Checkpoints(nn.Module):
    """OneTrainer's layer without a conductor."""

    def __init__(self, block):
        super().__init__()
        self.checkpoint, self.orig_forward, self.checkpointing = None, block.forward, True
        self.dummy = torch.zeros((1,), requires_grad=True)

    def __run(self, dummy, *args, **kwargs):
        return self.orig_forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(
                self.__run, self.dummy, *args, **kwargs, use_reentrant=False
            )
        return self.orig_forward(*args, **kwargs)


def test_a_checkpointing_wrapper_does_not_compute_a_block_twice():
    theirs, ours = pair(host_with, "diffusers")
    for blocks in blocks_of(ours):
        for block in blocks:
            block.forward = Checkpoints(block).forward
    report = fluxfast.accelerate(ours, strict=True)
    assert_equal(theirs, ours, INPUTS, trained=trained)
    assert report.calls("fused") == len(report.blocks)


def test_a_stream_that_came_from_another_device():
    x = torch.ones(3, requires_grad=True)
    assert came_from_another_device((2 * x).to("meta"))
    assert came_from_another_device(x.to("meta"))
    assert not came_from_another_device((2 * x).to(torch.float64))
    assert not came_from_another_device(2 * x)
    assert not came_from_another_device(x)
    assert not came_from_another_device(torch.ones(3))


def test_tensors_that_are_saved_in_host_memory():
    theirs, ours = pair(host_with, "diffusers")
    fluxfast.accelerate(ours, strict=True)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(theirs, ours, INPUTS, trained=trained)


def exchanged_parameter(module):
    """As loaders do, which put a new parameter where the old one was."""
    old = module.weight
    module.weight = copy.deepcopy(old)
    return old.data


def exchanged_memory(module):
    """As offloading does, which leaves the parameter where it is."""
    old = module.weight.data
    module.weight.data = old.clone()
    return old


@pytest.mark.parametrize("exchange", [exchanged_parameter, exchanged_memory])
@pytest.mark.parametrize(
    ("make", "convert"), [(KohyaLora, None), (KohyaLora, to_nf4), (OneTrainerColumnDora, None)]
)
def test_weights_that_are_elsewhere_in_backward(exchange, make, convert):
    theirs, ours = pair(host_with, "diffusers", make, convert=convert)
    fluxfast.accelerate(ours, recompute="full", strict=True)
    grads = []
    for model in (theirs, ours):
        out = model(**INPUTS)[0]
        blocks = ours.transformer_blocks if model is ours else ()
        for module in (m for b in blocks for group in b.maths().linear_groups() for m in group):
            exchange(module).view(torch.uint8).fill_(0x7F)
            assert torch.isfinite(read_linear(module).weight.to(torch.float32)).all()
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        grads.append(torch.autograd.grad((out * weights).sum(), trained(model).values()))
    for actual, expected in zip(*grads, strict=True):
        assert relative_error(actual, expected) < FP32
