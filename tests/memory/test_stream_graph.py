"""Streamed blocks beside what autograd, checkpoints and hooks do between forward and backward."""

import pytest
import torch
from stream_cases import LateEngine, SlowEngine, blocks_of, expected, make_model, same, step, stream
from torch.utils.checkpoint import checkpoint

from fluxfast.memory.stream import BlockStream
from support import make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("checkpoints", ["none", "the block's", "torch's"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_blocks_that_are_a_node_an_op(format, checkpoints):
    """Autograd saves weights, and views of them, that have moved by the time it needs them."""

    def composed():
        model = make_model(format)
        for block in blocks_of(model):
            # a linear that has to be called keeps a block from being one function
            block.attn.to_k.register_forward_hook(lambda *_: None)
        if checkpoints == "the block's":
            model.enable_gradient_checkpointing()
        elif checkpoints == "torch's":
            model.enable_gradient_checkpointing(
                lambda block, *args: checkpoint(block.__call__, *args, use_reentrant=False)
            )
        return model

    reference = step(composed())
    for slots in (2, 4):
        model = composed()
        stream(model, SlowEngine(), slots=slots)
        for _ in range(2):
            same(step(model), reference)


class Transposed(torch.nn.Module):
    """A block that is not ours: autograd saves a view of its weight."""

    def __init__(self, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(8, 8), requires_grad=False)
        torch.nn.init.normal_(self.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return (x @ self.weight.T[:, 1:] @ self.weight.T[1:]).tanh()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("slots", [2, 3])
def test_views_of_weights_that_autograd_saves(slots, checkpointing):
    blocks = [Transposed(seed) for seed in range(6)]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run():
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False) if checkpointing else block(h)
        with torch.no_grad():
            # else every block comes back into the very slot that it was in
            for i in (0, 3, 1, 5, 2):
                blocks[i](x)
        return (h, *torch.autograd.grad(h.square().sum(), x))

    reference = run()
    streamed = BlockStream(blocks, LateEngine(), slots=slots)
    for block in streamed._blocks:
        block.host = [torch.full_like(view, float("nan")) for view in block.host]
        block.bytes.point_at(block.host)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), reference, strict=True))


def test_reentrant_checkpoints():
    model = make_model("int8")
    model.enable_gradient_checkpointing(
        lambda block, *args: checkpoint(
            block.__call__, *args, use_reentrant=True, determinism_check="none"
        )
    )
    # in this kind of checkpoint nothing trains unless an input does
    inputs = make_inputs(2, 3, 4)
    inputs["hidden_states"].requires_grad_()
    stream(model)
    model(**inputs).sample.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.equal(p.grad, expected("int8")[1][name]), name
    assert all(
        p.grad is not None for name, p in model.named_parameters() if name in expected("int8")[1]
    )


def test_one_checkpoint_around_several_blocks():
    model = make_model("int8")
    blocks = blocks_of(model)[2:]
    x = torch.randn(2, 19, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    vec, pe = torch.randn(2, 64), (torch.randn(19, 16), torch.randn(19, 16))

    def run(x):
        for block in blocks:
            x = block(x, None, vec, pe)
        return x

    reference = torch.autograd.grad(
        run(x).square().sum(), [x, *(p for p in blocks[0].parameters() if p.requires_grad)]
    )
    stream(model)
    out = checkpoint(run, x, use_reentrant=False)
    grads = torch.autograd.grad(
        out.square().sum(), [x, *(p for p in blocks[0].parameters() if p.requires_grad)]
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, reference, strict=True))


def test_beside_hooks_of_others():
    """Other hooks see everything that autograd saves, except the weights."""
    model = make_model("int8")
    seen = []
    stream(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        result = step(model)
    same(result, expected("int8"))
    assert seen


def test_gradients_accumulate_and_the_graph_can_be_used_again():
    model, reference = make_model("int8"), make_model("int8")
    stream(model)
    for each in (model, reference):
        for seed in (0, 1):
            out = each(**make_inputs(2, 3, 4, seed=seed)).sample.square().mean()
            out.backward(retain_graph=True)
            out.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def test_forward_only_passes_between_steps():
    model = make_model("int8")
    stream(model)
    same(step(model), expected("int8"))
    with torch.no_grad():
        model.disable_adapters()
        base = model(**make_inputs(2, 3, 4)).sample
        model.enable_adapters()
        whole = model(**make_inputs(2, 3, 4)).sample
    assert not torch.equal(base, whole) and base.isfinite().all()
    assert torch.equal(whole, expected("int8")[0])
    same(step(model), expected("int8"))


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("between", ["a scale for one call", "another scale", "dropout off"])
def test_backward_uses_the_adapters_that_forward_read(between, policy):
    """Scale or dropout may change after forward, as PEFT's `scale` is reset before it returns."""

    def gradients(streamed):
        model = make_model("int8")
        model.set_recompute(policy)
        adapted = [module for module in model.modules() if hasattr(module, "lora_dropout")]
        for module in adapted:
            module.lora_dropout["default"] = torch.nn.Dropout(
                0.5 if between == "dropout off" else 0.0
            )
        if streamed:
            stream(model)
        torch.manual_seed(0)
        kwargs = (
            {"joint_attention_kwargs": {"scale": 0.3}} if between == "a scale for one call" else {}
        )
        loss = model(**make_inputs(2, 3, 4), **kwargs).sample.square().sum()
        if between == "dropout off":
            model.eval()
        elif between == "another scale":
            for module in adapted:
                module.scaling["default"] *= 3
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    resident, moved = gradients(False), gradients(True)
    assert resident and len(resident) == len(moved)
    assert all(torch.equal(a, b) for a, b in zip(resident, moved, strict=True))
