"""One adapter of OneTrainer's that q, k and v share is read as an adapter of each."""

import copy

import pytest
import torch
from dropin_hosts import assert_equal, diffusers_host, lora_parameters, pair, randomise_trained
from host_adapters import (
    OneTrainerColumnDora,
    OneTrainerDora,
    OneTrainerGroup,
    OneTrainerLoha,
    OneTrainerLokr,
    OneTrainerLora,
    linears_of,
)
from torch import nn

import fluxfast
from fluxfast.model.linear import obstacle, project, read_linear
from fluxfast.ops.linear.row_part import RowPart
from support import make_inputs, relative_error

# fp64: a sum's order, and OneTrainer's alpha in fp32
EXACT = 1e-6
COLUMNS = 28
# of q, k and v, and of q, k, v and an MLP's first
QKV, QKV_MLP = (20, 20, 20), (20, 20, 20, 80)


class NarrowLokr(OneTrainerLokr):
    """A LoKr whose first factor is the product of two."""

    use_w1 = False

    def create_layer(self, linear):
        super().create_layer(linear)
        del self.lokr_w1
        self.lokr_w1_a, self.lokr_w1_b = (nn.Parameter(torch.empty(s)) for s in ((4, 2), (2, 4)))

    def get_weight(self):
        return torch.kron(self.lokr_w1_a @ self.lokr_w1_b, self.lokr_w2)


ADAPTERS = [
    OneTrainerLora,
    OneTrainerDora,
    OneTrainerColumnDora,
    OneTrainerLoha,
    OneTrainerLokr,
    NarrowLokr,
]


def draw(module, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.ndim == 2 and 1 in p.shape))
    return module


def group_with(make, rows=QKV, group=OneTrainerGroup):
    """Frozen linears in fp64 with the same input, and a group that has their adapter."""
    linears = [draw(nn.Linear(COLUMNS, n), i).double() for i, n in enumerate(rows)]
    nn.ModuleList(linears).requires_grad_(False)
    group = group(linears, make)
    draw(group.module, 5).double()
    return linears, group


def called(linears):
    return lambda x: torch.cat([linear(x) for linear in linears], -1)


def results(call, x, group):
    y = call(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *group.module.parameters()])]


def assert_same(linears, group):
    """Values and every gradient are those of the group's own forwards."""
    x = torch.randn(2, 63, COLUMNS, dtype=torch.float64).requires_grad_()
    expected = results(called(linears), x, group)
    actual = results(lambda x: project(x, *linears), x, group)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < EXACT


def assert_read(linears, group):
    for linear in linears:
        assert (because := obstacle(linear)) is None, because
        assert len(read_linear(linear).adapters) == 1
    assert_same(linears, group)


@pytest.mark.parametrize("rows", [QKV, QKV_MLP])
@pytest.mark.parametrize("make", ADAPTERS)
def test_values_and_gradients_are_those_of_the_group(make, rows):
    assert_read(*group_with(make, rows))


def test_tensors_are_shared_and_not_copied():
    linears, group = group_with(OneTrainerLora)
    adapters = [read_linear(linear).adapters[0] for linear in linears]
    lora_down, lora_up = group.module.lora_down.weight, group.module.lora_up.weight
    assert all(adapter.a is lora_down for adapter in adapters)
    starts = [adapter.b.storage_offset() for adapter in adapters]
    assert starts == [0, 60, 120]
    assert {adapter.b.untyped_storage().data_ptr() for adapter in adapters} == {lora_up.data_ptr()}


def test_a_lokr_is_cut_where_its_factors_are_and_padded_elsewhere():
    # w1 has 4 rows of 15 each
    even, _ = group_with(OneTrainerLokr, (15, 30, 15))
    assert [len(read_linear(linear).adapters[0].w1[0]) for linear in even] == [1, 2, 1]
    odd, _ = group_with(OneTrainerLokr)
    parts = [read_linear(linear).adapters[0] for linear in odd]
    assert all(type(part) is RowPart for part in parts)
    assert [(len(part.adapter.w1[0]), part.first) for part in parts] == [(2, 0), (2, 5), (2, 10)]


def test_a_linear_by_itself_gets_its_own_rows():
    linears, group = group_with(OneTrainerColumnDora)
    x = torch.randn(3, COLUMNS, dtype=torch.float64)
    for linear in linears:
        assert relative_error(project(x, linear), linear(x)) < EXACT
    # and their lengths are those of all linears together
    group.leaves[0].weight.data *= 2
    assert relative_error(project(x, linears[2]), linears[2](x)) < EXACT


def test_what_the_adapter_says_is_read_at_each_call():
    linears, group = group_with(OneTrainerLora)
    assert_read(linears, group)
    group.module.alpha.fill_(3)
    assert read_linear(linears[1]).adapters[0].scale == 1
    assert_read(linears, group)
    draw(group.module, 8)
    assert_read(linears, group)
    group.remove_hook_from_module()
    assert all(read_linear(linear).adapters == () for linear in linears)
    group.hook_to_module()
    assert_read(linears, group)


class AroundOthers(OneTrainerGroup):
    """A group that leaves its linears an adapter that they had before."""

    def __init__(self, leaves, make):
        self.inner = draw(OneTrainerLora(leaves[1]), 7).double()
        super().__init__(leaves, make)


def test_a_linear_may_have_an_adapter_of_its_own_inside():
    linears, group = group_with(OneTrainerLoha, group=AroundOthers)
    assert [len(read_linear(linear).adapters) for linear in linears] == [1, 2, 1]
    assert_same(linears, group)


class Dropping(OneTrainerLora):
    def __init__(self, linear):
        super().__init__(linear)
        self.dropout.p = 0.5


class Rotation(OneTrainerLora):
    """Something else than the adapters that can be read, as OFT is."""

    def __init__(self, linear):
        super().__init__(linear)
        del self.rank

    def delta_forward(self, x):
        return None

    def forward(self, x):
        return self.orig_forward(x).flip(-1)


class OtherDelta(OneTrainerDora):
    """Weight decomposition that tells a group an addition after all."""

    def delta_forward(self, x):
        return OneTrainerLora.delta_forward(self, x)


class OtherGroup(OneTrainerGroup):
    """A later version, which does more."""

    def _leaf_output(self, place, start, stop, x):
        return super()._leaf_output(place, start, stop, x) * self.new_part


class OtherRows(OneTrainerGroup):
    def __init__(self, leaves, make):
        super().__init__(leaves, make)
        self.slices = [10, 30, 60]


class OtherBefore(OneTrainerGroup):
    def __init__(self, leaves, make):
        super().__init__(leaves, make)
        self.module.orig_forward = leaves[0].forward


@pytest.mark.parametrize(
    ("make", "group", "because"),
    [
        (Dropping, OneTrainerGroup, "a dropout between its two factors"),
        (Rotation, OneTrainerGroup, "its forward was replaced by Rotation's"),
        (OtherDelta, OneTrainerGroup, "what its adapter adds in a group"),
        (OneTrainerLora, OtherGroup, "its group's forward has names that fluxfast doesn't know"),
        (OneTrainerLora, OtherRows, "its group's rows are not those of its linears"),
        (OneTrainerDora, OtherBefore, "is around another forward than its linears'"),
    ],
)
def test_what_cannot_be_read_is_called_and_says_why(make, group, because):
    linears, _ = group_with(make, group=group)
    assert because in obstacle(linears[1])


@pytest.mark.parametrize("make", [OneTrainerLora, OneTrainerColumnDora, OneTrainerLokr])
def test_one_linear_may_be_called_and_the_others_read(make):
    linears, group = group_with(make)
    linears[1].register_forward_hook(lambda module, x, y: 2 * y)
    assert [obstacle(linear) is None for linear in linears] == [True, False, True]
    assert_same(linears, group)


def test_dora_by_columns_needs_every_linear():
    linears, _ = group_with(OneTrainerColumnDora)
    linears[2].__class__ = type("Other", (nn.Linear,), {"forward": lambda self, x: x})
    assert "a linear that shares its adapter can't be read" in obstacle(linears[0])


def groups_of(model):
    """The linears that share an adapter, and then those with one of their own."""
    for block in model.modules():
        if type(block).__name__ == "FluxTransformerBlock":
            attn = block.attn
            yield [attn.to_q, attn.to_k, attn.to_v]
            yield [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        elif type(block).__name__ == "FluxSingleTransformerBlock":
            yield [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]


def host_with(make):
    model = diffusers_host()
    model.groups = [OneTrainerGroup(leaves, make) for leaves in groups_of(model)]
    shared = {id(leaf) for group in model.groups for leaf in group.leaves}
    own = [make(linear) for linear in list(linears_of(model)) if id(linear) not in shared]
    model.network = nn.ModuleList([*own, *(group.module for group in model.groups)])
    randomise_trained(model)
    return model


@pytest.mark.parametrize("make", ADAPTERS)
def test_blocks_run_fused_with_shared_adapters(make):
    theirs, ours = pair(host_with, make)
    report = fluxfast.accelerate(ours, strict=True)
    assert all(block.fused for block in report.blocks)
    assert all(linear.adapters == 1 for linear in report.linears)
    # fp32: the parts of a shared tensor's gradient are added in another order, too
    assert_equal(theirs, ours, make_inputs(2, 6, 4, guidance=False))
    assert report.calls("fused") == report.calls() == len(report.blocks)
    assert all(p.grad is not None for p in ours.network.parameters())
    fluxfast.restore(ours)
    assert_equal(theirs, ours, make_inputs(2, 6, 4, guidance=False), tolerance=1e-12)


def test_a_block_takes_it_when_the_adapter_goes_and_comes():
    theirs, ours = pair(host_with, OneTrainerLora)
    report = fluxfast.accelerate(ours, strict=True)
    inputs = make_inputs(1, 6, 4, guidance=False)
    with torch.no_grad():
        for change in ("remove_hook_from_module", "hook_to_module"):
            for model in (theirs, ours):
                for group in model.groups:
                    getattr(group, change)()
            # two orders of summation in fp32
            assert relative_error(ours(**inputs)[0], theirs(**inputs)[0]) < 1e-5
    assert report.calls("fused") == report.calls()


def test_a_compiled_model_traces_the_groups_own_forwards():
    torch._dynamo.reset()
    theirs, ours = pair(host_with, OneTrainerLora)
    report = fluxfast.accelerate(ours)
    compiled, trained = torch.compile(ours, backend="eager"), lora_parameters(ours)
    assert_equal(
        theirs,
        compiled,
        make_inputs(2, 3, 5, guidance=False),
        trained=lambda model: trained if model is compiled else lora_parameters(model),
    )
    assert report.calls() == 0
    torch._dynamo.reset()


def test_a_copy_trains_its_own_adapter():
    ours = host_with(OneTrainerLora)
    fluxfast.accelerate(ours, strict=True)
    other = copy.deepcopy(ours)
    other(**make_inputs(1, 6, 4, guidance=False))[0].sum().backward()
    assert all(p.grad is None for p in ours.network.parameters())
    assert all(p.grad is not None for p in other.network.parameters())
