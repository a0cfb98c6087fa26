"""Streamed blocks give the resident model's bits in every combination, and survive failures."""

import gc
import weakref

import pytest
import torch
from safetensors import safe_open
from stream_cases import (
    ROUTES,
    FailingEngine,
    LateEngine,
    SlowEngine,
    blocks_of,
    expected,
    make_model,
    same,
    step,
    stream,
)

from fluxfast.memory.engine import Engine
from fluxfast.memory.stream import BlockStream, stream_blocks
from fluxfast.model.residency import fetch_input, keep_input, resident
from fluxfast.quant import FORMATS

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(model, count):
    for _ in range(count):
        step(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_the_same_bits_in_every_format(format, checkpointing):
    model = make_model(format, checkpointing=checkpointing)
    stream(model)
    for seed in (0, 1, 0):
        same(step(model, seed), expected(format, seed=seed))


@pytest.mark.parametrize("routes", [None, ROUTES], ids=["plain", "tread"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks_per_group", [1, 2, 3])
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_the_same_bits_for_every_ring(slots, blocks_per_group, checkpointing, routes):
    model = make_model("int8", routes, checkpointing)
    streamed = stream(model, SlowEngine(slots), slots=slots, blocks_per_group=blocks_per_group)
    for seed in (0, 1):
        same(step(model, seed), expected("int8", routes, seed))
    groups = -(-5 // blocks_per_group)
    assert streamed.schedule.slots == min(slots, groups)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", [Engine, LateEngine, SlowEngine])
@pytest.mark.parametrize("format", [None, "int4"])
def test_the_same_bits_from_disk(format, engine, checkpointing, tmp_path, monkeypatch):
    # several reads a block, so that a block does not end with a read
    monkeypatch.setattr("fluxfast.memory.disk.STAGING_BYTES", 10_000)
    model = make_model(format, checkpointing=checkpointing)
    streamed = stream(
        model,
        engine(torch.device("cpu")) if engine is Engine else engine(),
        disk_path=tmp_path / "blocks",
    )
    for seed in (0, 1, 0):
        same(step(model, seed), expected(format, seed=seed))
    assert len(list((tmp_path / "blocks").iterdir())) == 5
    streamed.close()
    assert not list((tmp_path / "blocks").iterdir())


@pytest.mark.parametrize("interval", [2, 3])
def test_some_blocks_checkpointed(interval):
    model = make_model("int8", checkpointing=True)
    model.gradient_checkpointing_interval = interval
    stream(model)
    same(step(model), expected("int8"))


def test_only_what_is_needed_is_copied():
    model = make_model("int8")
    engine = LateEngine()
    stream(model, engine, slots=3)
    step(model)
    first = engine.copies
    step(model)
    step(model)
    assert engine.copies - first == 2 * 2 * (5 - 3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_exception_anywhere(checkpointing):
    """Forward and backward fail in each block; the next step is as if nothing had happened."""

    class BrokenError(Exception):
        pass

    def fail(*_):
        raise BrokenError

    model = make_model("int8", checkpointing=checkpointing)
    stream(model)
    for block in blocks_of(model):
        hook = block.register_forward_hook(fail)
        with pytest.raises(BrokenError):
            step(model)
        hook.remove()
        norm = block.attn.norm_q
        breaking = norm.register_forward_hook(fail)
        linear = (block.norm1 if hasattr(block, "norm1") else block.norm).linear
        breaking_too = linear.register_forward_hook(fail)
        with pytest.raises(BrokenError):
            step(model)
        breaking.remove()
        breaking_too.remove()
        hook = block.register_full_backward_hook(fail)
        with pytest.raises(BrokenError):
            step(model)
        hook.remove()
        model.zero_grad()
        same(step(model), expected("int8"))


@pytest.mark.parametrize("at", [0, 1, 4, 6, 8])
def test_a_copy_that_fails(at):
    model = make_model("int8")
    engine = FailingEngine(at)
    stream(model, engine)
    with pytest.raises(OSError, match="the copy failed"):
        steps(model, 3)
    model.zero_grad()
    same(step(model), expected("int8"))


def test_a_file_that_shrinks_is_named(tmp_path, monkeypatch):
    model = make_model("int8")
    streamed = stream(model, disk_path=tmp_path, poison=False)
    step(model)
    victim = tmp_path / "block_003.safetensors"
    with victim.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(OSError, match=r"block_003\.safetensors.*bytes are missing"):
        step(model)
    # nor is what was there before taken for it
    with pytest.raises(OSError, match=r"block_003\.safetensors"):
        step(model)
    streamed.close()


def test_block_files_are_safetensors(tmp_path):
    model = make_model("int8")
    weight = model.transformer_blocks[0].norm1.linear.base_layer.packed().parts["packed"].clone()
    streamed = stream(model, disk_path=tmp_path, poison=False)
    with safe_open(tmp_path / "block_000.safetensors", "pt") as file:
        assert list(file.keys()) == ["block"]
        places = {place.path: place for place in streamed._blocks[0].bytes.tensors}
        stored = places["norm1.linear.base_layer.weight_packed"].view(file.get_tensor("block"))
        assert torch.equal(stored, weight)
        assert "norm1.linear.base_layer.weight_packed" in file.metadata()["tensors"]


@pytest.mark.parametrize("disk", [False, True])
def test_outside_the_blocks_nothing_seems_to_have_moved(disk, tmp_path):
    model, reference = make_model("int4"), make_model("int4")
    ids = {name: id(p) for name, p in model.named_parameters()}
    streamed = stream(model, poison=False, disk_path=tmp_path if disk else None)
    for _ in range(2):
        state, original = model.state_dict(), reference.state_dict()
        assert list(state) == list(original)
        assert all(
            torch.equal(state[name], original[name]) and state[name].dtype == original[name].dtype
            for name in state
        )
        step(model)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    with resident(model.transformer_blocks[0], "forward"):
        inside = model.transformer_blocks[0].attn.to_k.weight_packed
        assert any(
            inside.untyped_storage()._cdata == slot.untyped_storage()._cdata
            for slot in streamed._ring
        )
    streamed.close()
    same(step(model), expected("int4"))


def test_neighbours_stay_neighbours_in_a_slot():
    """Linears that see the same input are one matrix on the device too, and tensors are aligned."""
    model = make_model()
    streamed = stream(model)
    for block, members in [
        (model.transformer_blocks[0].attn, ("add_q_proj", "add_k_proj", "add_v_proj")),
        (model.single_transformer_blocks[0].attn, ("to_q", "to_k", "to_v")),
    ]:
        owner = next(b for b in blocks_of(model) if block in b.modules())
        with resident(owner, "forward"):
            weights = [
                getattr(m, "base_layer", m).weight
                for m in (getattr(block, name) for name in members)
            ]
            starts = [w.data_ptr() for w in weights]
            assert starts[1:] == [w.data_ptr() + w.nbytes for w in weights[:-1]]
    assert all(
        place.offset % 256 == 0
        for b in streamed._blocks
        for place in b.bytes.tensors
        if "norm_" in place.path
    )


def test_moves_leave_streamed_weights_and_casts_are_refused():
    model = make_model("int8")
    streamed = stream(model, poison=False)
    weights = [
        tensor for block in streamed._blocks for tensor in (p.tensor for p in block.bytes.tensors)
    ]
    places = [t.data_ptr() for t in weights]
    model.to("cpu").to(torch.float32)
    assert [
        p.tensor.data_ptr() for block in streamed._blocks for p in block.bytes.tensors
    ] == places
    with pytest.raises(ValueError, match=r"streamed in torch\.float32 and can't be cast"):
        model.transformer_blocks[0].to(torch.bfloat16)
    # a move takes along what is not streamed
    model.to("meta")
    assert model.x_embedder.weight.is_meta
    assert next(
        p for n, p in model.named_parameters() if "transformer_blocks.0.attn.to_q.lora_A" in n
    ).is_meta
    assert [
        p.tensor.data_ptr() for block in streamed._blocks for p in block.bytes.tensors
    ] == places


def test_modules_can_be_left_where_they_are():
    model = make_model("int8")
    streamed = stream(model, leave=("norm1.linear", "norm1_context.linear", "norm.linear"))
    paths = {place.path for block in streamed._blocks for place in block.bytes.tensors}
    assert not any(
        path.startswith(("norm1.linear", "norm.linear", "norm1_context.linear")) for path in paths
    )
    assert "attn.to_q.base_layer.weight_packed" in paths
    same(step(model), expected("int8"))


class FusedBlock(torch.autograd.Function):
    """A block as one function (x W and its gradient) that reads its module twice."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        with resident(block, "forward"):
            out = x @ block.inner.weight.T
        ctx.x = keep_input(block, x)
        return out.tanh()

    @staticmethod
    def backward(ctx, dy):
        x = fetch_input(ctx.block, ctx.x)
        with resident(ctx.block, "backward"):
            weight = ctx.block.inner.weight
            return (dy * (1 - (x @ weight.T).tanh().square())) @ weight, None


class Fused(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
        torch.nn.init.normal_(self.inner.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return FusedBlock.apply(x, self)


@pytest.mark.parametrize("inputs_on_host", [False, True])
@pytest.mark.parametrize("slots", [2, 3])
def test_blocks_that_say_when_they_compute(slots, inputs_on_host):
    from fluxfast.memory.host_inputs import HostInputs

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    blocks = [Fused(seed) for seed in range(6)]

    def run():
        h = x
        for block in blocks:
            h = block(h)
        return (h, *torch.autograd.grad(h.square().sum(), x))

    reference = run()
    inputs = HostInputs(torch.device("cpu")) if inputs_on_host else None
    streamed = BlockStream(blocks, LateEngine(), slots=slots, inputs=inputs)
    for block in streamed._blocks:
        block.host = [torch.full_like(view, float("nan")) for view in block.host]
        block.bytes.point_at(block.host)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), reference, strict=True))
    if inputs is not None:
        # one buffer of the input's size a block, however often
        assert inputs.nbytes == 6 * 3 * 8 * 4


def test_stream_blocks_of_a_transformer():
    model = make_model("int8")
    streamed = stream_blocks(model, "cpu", slots=3, inputs_on_host=True)
    same(step(model), expected("int8"))
    assert streamed.ring_bytes == 3 * max(block.bytes.nbytes for block in streamed._blocks)
    frozen = {
        p.tensor.untyped_storage()._cdata for block in streamed._blocks for p in block.bytes.tensors
    }
    assert len(frozen) == 5
    assert streamed.block_bytes == sum(block.buffer.nbytes for block in streamed._blocks)
    streamed.close()
    assert all(getattr(block, "residency", None) is None for block in blocks_of(model))
    assert not model._forward_pre_hooks
    same(step(model), expected("int8"))


def test_nothing_is_kept_alive():
    model = make_model("int8")
    streamed = stream(model, poison=False)
    step(model)
    slots = [weakref.ref(slot) for slot in streamed._ring]
    streamed.close()
    gone = weakref.ref(streamed)
    del streamed
    gc.collect()
    assert gone() is None
    assert all(slot() is None for slot in slots)


def test_what_cannot_be_streamed():
    model = make_model("int8")
    with pytest.raises(ValueError, match="at least 2"):
        BlockStream(blocks_of(model), LateEngine(), slots=1)
    with pytest.raises(ValueError, match="blocks_per_group is 0"):
        BlockStream(blocks_of(model), LateEngine(), blocks_per_group=0)
    stream(model)
    with pytest.raises(ValueError, match="streamed already"):
        stream(model)
    with pytest.raises(ValueError, match="no frozen tensor"):
        BlockStream([torch.nn.Linear(2, 2)], LateEngine())
