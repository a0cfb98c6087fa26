"""Transposed copies of a model's codes: made when it is made ready, seen by nobody else, and gone
with what they were made from.
"""

import pytest
import torch

from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.stored_codes import codes_of, keep_transposed, transposed_copies
from fluxfast.ops import dispatch
from fluxfast.ops.linear import transposed_codes
from fluxfast.quant.linear import QuantLinear
from small_flux import small_flux
from support import make_inputs

KEPT = Choices(("full",) * 5, compute="int8", transposed_codes=True)
COMPUTE = {"int8": "int8", "fp8_e4m3": "e4m3"}


def groups_of(model):
    return [group for block in model.blocks for group in block.linear_groups()]


def copies_of(model, compute="int8"):
    return transposed_copies(groups_of(model), compute)


def test_codes_of_which_nobody_counts_the_changes():
    """Those made in inference mode may change unseen, and keep no copy."""
    with torch.inference_mode():
        codes = torch.ones(4, 8, dtype=torch.int8)
    transposed_codes.remember(codes, codes.T.contiguous())
    assert transposed_codes.copy_of(codes) is None


@pytest.mark.parametrize("format", COMPUTE)
def test_each_group_has_one_copy(format):
    compute = COMPUTE[format]
    model = small_flux(format, ["to_q", "proj_mlp"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = [name for name, _ in model.named_buffers()]
    make_ready(model, Choices(("full",) * 5, compute=compute, transposed_codes=True))
    groups, copies = groups_of(model), copies_of(model, compute)
    assert len(copies) == len(groups)
    for group, copy in zip(groups, copies, strict=True):
        codes = torch.cat([q.view(torch.uint8) for q in codes_of(group, compute)])
        assert torch.equal(copy.view(torch.uint8), codes.T)
    work = Workload(
        sizes=FluxSizes.from_config(dict(model.config)),
        tokens=(20,) * 5,
        text_tokens=4,
        batch=1,
        storage=Storage(format),
        targets=(),
        rank=1,
        compute=compute,
    )
    assert sum(copy.nbytes for copy in copies) == work.product_codes
    # they are in no state dict and among no buffers
    after = model.state_dict()
    assert list(after) == list(before) and [n for n, _ in model.named_buffers()] == buffers
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("format", [None, "nf4", "fp8_e4m3"])
def test_only_codes_that_products_read_have_copies(format):
    model = small_flux(format)
    make_ready(model, KEPT)
    assert not copies_of(model) and not copies_of(model, "e4m3")


def test_copies_stay_until_others_are_chosen():
    model = small_flux("int8", ["to_q"])
    make_ready(model, KEPT)
    before = [copy.data_ptr() for copy in copies_of(model)]
    make_ready(model, KEPT)
    assert [copy.data_ptr() for copy in copies_of(model)] == before
    make_ready(model, Choices(("full",) * 5, compute="int8"))
    assert not copies_of(model)


def test_a_changed_model_has_none_until_it_is_made_ready():
    model, other = small_flux("int8"), small_flux("int8")
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, QuantLinear):
                module.weight_packed.neg_()
    make_ready(model, KEPT)
    model.load_state_dict(other.state_dict())
    assert not copies_of(model)
    make_ready(model, KEPT)
    assert torch.equal(copies_of(model)[1], other.blocks[0].attn.to_out[0].weight_packed.T)
    model.to(torch.bfloat16)
    assert not copies_of(model)


def test_linears_that_are_no_codes_leave_their_group_without():
    model = small_flux("int8")
    model.transformer_blocks[0].attn.to_q = torch.nn.Linear(64, 64).requires_grad_(False)
    keep_transposed(groups_of(model), "int8")
    assert len(copies_of(model)) == len(groups_of(model)) - 1


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
def test_a_model_trains_as_without(monkeypatch):
    """This GPU, or Triton's interpreter, reads transposed codes here, as Hopper does."""
    from fluxfast_kernels import launch, quant_matmul

    made, transpose = [], quant_matmul.transpose_codes
    monkeypatch.setattr(quant_matmul, "transpose_codes", lambda w: made.append(w) or transpose(w))
    device = torch.device("cpu" if launch.interpreted() else "cuda")
    monkeypatch.setitem(launch.TRANSPOSE_FROM, launch.arch_key(device), {"rows": 1})
    inputs = {name: tensor.to(device) for name, tensor in make_inputs(1, 2, 2).items()}
    found = []
    for kept in (True, False):
        model = small_flux("int8", ["to_q"], num_layers=1, num_single_layers=1).to(device)
        make_ready(model, Choices(("full",) * 2, compute="int8", transposed_codes=kept))
        for block in model.blocks:
            block.impl = "triton"
        out = model(**inputs).sample
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert bool(made) != kept
    # the prediction, and A and B of each block's to_q
    assert len(found[0]) == 1 + 2 * 2
    assert all(torch.equal(with_copy, without) for with_copy, without in zip(*found, strict=True))
