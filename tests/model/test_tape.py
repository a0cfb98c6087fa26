"""What a block's tape keeps, against the policies' tables, and what backward computes again."""

from itertools import pairwise

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from block_cases import block_of, inputs, make_model, run
from fluxfast.model import fused_double, single_block, tape
from fluxfast.model.fused_double import KEPT_DOUBLE, SIZES_DOUBLE
from fluxfast.model.single_block import KEPT_SINGLE, SIZES_SINGLE
from fluxfast.model.tape import Tape
from fluxfast.ops import attention
from fluxfast.ops.linear.group import LinearGroup

TABLES = {"double": (KEPT_DOUBLE, SIZES_DOUBLE), "single": (KEPT_SINGLE, SIZES_SINGLE)}
both_kinds = pytest.mark.parametrize("kind", TABLES)
every_policy = pytest.mark.parametrize("policy", tape.POLICIES)
every_impl = pytest.mark.parametrize("impl", ["ref", "native"])


def test_a_tape_keeps_what_it_is_told_to():
    one, other = torch.ones(2), torch.ones(3)
    first = Tape({"y"})
    assert first.kept("y") is None
    assert first.keep("y", one, None) == (one, None) and first.keep("z", other) == (other,)
    again = Tape(values=first.values)
    assert again.kept("y") == (one, None) and again.kept("z") is None
    again.keep("z", other)
    assert again.kept("z") is None


@both_kinds
def test_the_tables_are_whole(kind):
    kept, sizes = TABLES[kind]
    assert set(kept) == {*tape.POLICIES, "all"}
    names = [set(kept[row]) for row in ("full", "selective", "none", "all")]
    # each policy keeps what the one before it keeps, and more
    assert all(fewer < more for fewer, more in pairwise(names))
    assert names[-1] == set(sizes)


def what_forward_kept(kind, policy, impl):
    """A tape's values by name (a double block has three tapes), and all other saved tensors."""
    model = make_model(rank=1)
    block = block_of(model, kind)
    block.policy, block.impl = policy, impl
    img, txt, vec, pe = inputs(model, torch.float32, batch=1, tokens=121)
    if kind == "double":
        ctx = block(img, txt, vec, pe)[0].grad_fn
        tensors, trained, saved = tape.saved(ctx)
        tapes = saved.values
    else:
        x = torch.cat([txt, img], 1).detach().requires_grad_()
        ctx = block(x, None, vec, pe).grad_fn
        tensors, trained, saved = tape.saved(ctx)
        tapes = [saved.values]
    kept = {}
    for values in tapes:
        for name, value in values.items():
            kept.setdefault(name, []).append(value)
    return kept, [*tensors, *trained], 128 * model.inner_dim * 4


@both_kinds
@every_policy
@every_impl
def test_what_is_saved_is_what_the_table_says(kind, policy, impl):
    kept, others, e = what_forward_kept(kind, policy, impl)
    table, sizes = TABLES[kind]
    assert set(kept) == set(table["all" if (policy, impl) == ("none", "native") else policy])
    seen = {t.untyped_storage().data_ptr() for t in others}
    for name, size in sizes.items():
        made = 0
        for t in tree_leaves(kept.get(name, [])):
            if t is not None and t.untyped_storage().data_ptr() not in seen:
                seen.add(t.untyped_storage().data_ptr())
                made += t.untyped_storage().nbytes()
        if name in kept:
            # statistics and narrow products are a few numbers a token, of which a row has 64
            assert size * e <= made < (size + 0.1) * e, name


def recorded_activations(patch, kind):
    """A list to which each pass over a block's shared function adds all that it has made."""
    module = fused_double if kind == "double" else single_block
    name = "_to_last_products" if kind == "double" else "_to_last_product"
    shared, found = getattr(module, name), []

    def recording(*args):
        made = shared(*args)
        parts = {"joint": vars(made)}
        if kind == "double":
            for stream in args[2]:
                names = ("x_in", "norm1", "qkv", "s_qkv", "attn_in", "s_out", "x1", "mlp_in")
                names = (*names, "norm2", "h", "s_h", "ff2_in")
                parts[id(stream.x)] = [getattr(stream, name) for name in names]
        else:
            parts["joint"] = vars(made.joint)
            parts["rest"] = [v for name, v in vars(made).items() if name != "joint"]
        # backward overwrites some of them
        copies = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, parts)
        found.append(tree_leaves(list(copies.values())))
        return made

    patch.setattr(module, name, recording)
    return found


@both_kinds
@every_policy
@every_impl
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_backward_has_forwards_values_bit_for_bit(monkeypatch, kind, policy, impl, compute):
    model = make_model(dropout=0.4)
    found = recorded_activations(monkeypatch, kind)
    run(model, kind, torch.float32, policy=policy, impl=impl, compute=compute)
    forward, backward = found
    tensors = 0
    for one, other in zip(forward, backward, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            tensors += 1
            assert one.dtype == other.dtype and torch.equal(one, other)
    assert tensors > (30 if kind == "double" else 12)


@both_kinds
@every_policy
@every_impl
def test_what_backward_computes_again(monkeypatch, kind, policy, impl):
    """The products and the attention that are not on the tape; never the last products."""
    calls = []

    def counted(where, what):
        original = where.forward
        monkeypatch.setattr(
            where,
            "forward",
            lambda *args, **kwargs: (calls.append(what), original(*args, **kwargs))[1],
        )

    counted(LinearGroup, "product")
    counted(attention, "attention")
    model = make_model()
    block = block_of(model, kind)
    block.policy, block.impl = policy, impl
    out = block(*inputs(model, torch.float32))[0]
    assert calls.count("attention") == 1
    calls.clear()
    out.sum().backward()
    products = 0 if policy == "none" else {"double": 6, "single": 1}[kind]
    assert calls.count("product") == products
    assert calls.count("attention") == (1 if policy == "full" else 0)
