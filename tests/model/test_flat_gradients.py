"""Gradients in one buffer: the same bits as autograd gives, whatever blocks run and by what way."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast.adapters.kinds import without_adapters
from fluxfast.model import graphs, tape
from fluxfast.model.block_base import BlockBase
from fluxfast.model.flat_gradients import FlatGradients, GradientPlaces
from fluxfast.ops.device import pretend
from fluxfast.ops.linear.products_torch import adjoining
from graph_emulator import Pool, capture, see_every_op
from small_flux import randomise_lora, small_flux
from support import in_interpreter, make_inputs

EVERYTHING = [
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),
]
# linears without an adapter in the middle of a group, and some outside of blocks
SOME = ["to_q", "to_v", "add_k_proj", "proj_mlp", "ff.net.2", "x_embedder", "norm.linear"]

ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}


def make_model(targets=EVERYTHING, impl="auto", policy="none", **config):
    model = small_flux(None, targets, **config)
    model.set_recompute(policy)
    for block in model.blocks:
        block.impl = impl
    return model


def of_ranks(ranks, default=3):
    """Adapters of several ranks, and a second LoRA, of rank 2, on some linears."""
    model = small_flux(**ONE_OF_EACH)
    for name, r, pattern in (("default", default, ranks), ("second", 2, {})):
        targets = EVERYTHING if name == "default" else ["to_k", "proj_mlp"]
        model.add_adapter(
            LoraConfig(r=r, rank_pattern=pattern, target_modules=targets), adapter_name=name
        )
    model.set_adapter(["default", "second"])
    randomise_lora(model)
    return model.train()


def backward(model, seed, tokens=(3, 4)):
    model(**make_inputs(2, *tokens, seed=seed)).sample.square().mean().backward()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(
    model, micro_batches=1, *, flat, count=2, tokens=((3, 4),), before=lambda model, number: None
):
    """The gradients of each of some steps, after each of which the weights change.

    tokens: of the micro-batches in turn. before: is called before each, with its number.
    """
    parameters, found, number = trained(model), [], 0
    gradients = FlatGradients(model, accumulates=micro_batches > 1) if flat else None
    for _ in range(count):
        for _ in range(micro_batches):
            before(model, number)
            backward(model, number, tokens[number % len(tokens)])
            number += 1
            if gradients is not None:
                gradients.take()
        if gradients is not None:
            gradients.hand_over()
        found.append([None if p.grad is None else p.grad.clone() for p in parameters])
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p -= 0.01 * p.grad
                p.grad = None
    return found


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert [g is None for g in a] == [g is None for g in e]
        assert all(x is None or torch.equal(x, y) for x, y in zip(a, e, strict=True))


@pytest.mark.parametrize("policy", tape.POLICIES)
@pytest.mark.parametrize("targets", [EVERYTHING, SOME], ids=["all", "some"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_same_bits(policy, targets, micro_batches):
    expected = steps(make_model(targets, policy=policy), micro_batches, flat=False)
    model = make_model(targets, policy=policy)
    same(steps(model, micro_batches, flat=True), expected)
    # autograd hears of no tensor of a block, unless it is modulation's
    backward(model, 0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            of_block = name.startswith(("transformer_blocks", "single_transformer_blocks"))
            assert (p.grad is None) == (of_block and "norm.linear" not in name), name
    assert all(block.gradients.written for block in model.blocks)


@pytest.mark.parametrize(
    ("impl", "targets", "compute"),
    [
        pytest.param("triton", EVERYTHING, "same", marks=in_interpreter),
        pytest.param("triton", SOME, "same", marks=in_interpreter),
        ("ref", EVERYTHING, "int8"),
        ("native", SOME, "int8"),
    ],
    ids=["triton", "triton-some", "ref-int8", "native-int8-some"],
)
def test_the_same_bits_by_each_implementation(impl, targets, compute):

    def made():
        model = make_model(targets, impl, **ONE_OF_EACH)
        model.set_compute(compute)
        return model

    same(steps(made(), flat=True, count=1), steps(made(), flat=False, count=1))


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=in_interpreter)])
def test_ranks_that_differ_and_two_loras(impl):
    def made():
        model = of_ranks({"to_k": 1, "proj_out": 5})
        for block in model.blocks:
            block.impl = impl
        return model

    same(steps(made(), flat=True, count=1), steps(made(), flat=False, count=1))


def test_in_sixteen_bits_and_two_dtypes():
    def made(mixed):
        model = make_model().to(torch.bfloat16)
        for name, p in model.named_parameters():
            if mixed and "lora_A" in name:
                p.data = p.data.float()
        return model

    for mixed in (False, True):
        model = made(mixed)
        actual = steps(model, 2, flat=True)
        assert {b.dtype for b in model.gradients.buffers} == (
            {torch.bfloat16, torch.float32} if mixed else {torch.bfloat16}
        )
        same(actual, steps(made(mixed), 2, flat=False))


def test_dropout():
    def made():
        model = make_model()
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.3)
        return model

    def seeded(model, number):
        torch.manual_seed(number)

    same(
        steps(made(), flat=True, count=1, before=seeded),
        steps(made(), flat=False, count=1, before=seeded),
    )


def test_what_one_launch_writes_lies_together():
    model = make_model()
    gradients = FlatGradients(model)
    (buffer,) = gradients.buffers
    for block in model.blocks:
        place = dict(zip(block.gradients.trained, block.gradients.places, strict=True))
        for group in tape.read_linears(block.linear_groups()):
            for tensors in zip(*(p.adapters[0].tensors for p in group), strict=True):
                run = adjoining([place[t] for t in tensors])
                assert run is not None and run.data_ptr() % 16 == 0
    # nothing but what pads the beginnings of runs is in it beside the gradients
    elements = sum(p.numel() for p in trained(model))
    assert elements <= buffer.numel() < elements + 4 * 2 * 8 * len(model.blocks)
    starts = []
    for seed in range(2):
        backward(model, seed)
        gradients.take()
        gradients.hand_over()
        starts.append([p.grad.data_ptr() for p in trained(model)])
        assert all(
            p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            for p in trained(model)
        )
        model.zero_grad(set_to_none=True)
    assert starts[0] == starts[1]


class CopiesTo(TorchDispatchMode):
    """Counts what torch itself writes to some memory."""

    def __init__(self, buffers):
        super().__init__()
        self._starts, self.count = {b.untyped_storage().data_ptr() for b in buffers}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            written = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.count += any(t.untyped_storage().data_ptr() in self._starts for t in written)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", [EVERYTHING, ["to_q", "to_v"]], ids=["all", "some"])
def test_kernels_write_to_the_buffer_themselves(targets):
    """Where all linears of a group have one LoRA of one rank, nothing is copied there."""
    model = make_model(targets, "triton", **ONE_OF_EACH)
    (buffer,) = FlatGradients(model).buffers
    start, writing = buffer.untyped_storage().data_ptr(), set()

    def on_launch(kernel, args, numbers):
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == start:
                writing.add(kernel.__name__)

    with pretend("sm_90", on_launch):
        loss = model(**make_inputs(1, 3, 4)).sample.square().mean()
        with CopiesTo([buffer]) as copies:
            loss.backward()
    if targets is EVERYTHING:
        assert writing and writing <= {"lora_grads_kernel", "lora_outer_kernel"}
        assert copies.count == 0
    else:
        assert copies.count > 0


def test_a_block_that_runs_composed_now_and_then(monkeypatch):
    fused = BlockBase._fused_call

    def sometimes(model, number):
        composed = {number % 5, (number + 2) % 5}

        def fused_call(self, *args):
            return None if model.blocks.index(self) in composed else fused(self, *args)

        monkeypatch.setattr(type(model.blocks[0]), "_fused_call", fused_call)
        monkeypatch.setattr(type(model.blocks[-1]), "_fused_call", fused_call)

    expected = steps(make_model(), 3, flat=False, before=sometimes)
    same(steps(make_model(), 3, flat=True, before=sometimes), expected)


def test_two_passes_before_one_take_add_up():
    model, other = make_model(), make_model()
    gradients = FlatGradients(model)
    for seed in range(3):
        backward(model, seed)
        backward(other, seed)
    gradients.take()
    gradients.hand_over()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(*map(trained, (model, other)), strict=True)
    )


def test_what_gets_no_gradient_keeps_none():
    model, names = make_model(), ("single_transformer_blocks.0", "single_transformer_blocks.1")
    gradients = FlatGradients(model, accumulates=True)
    backward(model, 0)
    gradients.take()
    gradients.hand_over()
    model.zero_grad(set_to_none=True)
    # a step in which two blocks are passed over
    kept = list(model.single_transformer_blocks)
    for micro_batch in range(2):
        del model.single_transformer_blocks[:2]
        backward(model, micro_batch)
        gradients.take()
    gradients.hand_over()
    model.single_transformer_blocks = torch.nn.ModuleList(kept)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad is None) == name.startswith(names)
    # what is clipped, and what its norm is of, is what is handed over
    norm = sum(p.grad.double().square().sum() for p in trained(model) if p.grad is not None)
    assert sum(b.double().square().sum() for b in gradients.buffers) == pytest.approx(norm)


def test_hooks_and_frozen_tensors_stay_with_autograd():
    model = make_model()
    hooked, frozen = model.blocks[0].attn.to_q, model.blocks[1].attn.to_q
    seen = []
    hooked.lora_A["default"].weight.register_hook(seen.append)
    frozen.lora_B["default"].weight.requires_grad_(False)
    gradients = FlatGradients(model)
    assert [block.gradients is None for block in model.blocks] == [True, True] + [False] * 3
    # and where one is frozen after that
    later = model.blocks[2].linear_groups()[0][0].lora_A["default"].weight
    later.requires_grad_(False)
    backward(model, 0)
    gradients.take()
    gradients.hand_over()
    assert len(seen) == 1 and later.grad is None
    assert all(p.grad is not None for p in trained(model))


def test_without_it_nothing_changes():
    model = make_model()
    loss = model(**make_inputs(1, 3, 4)).sample.square().mean()
    assert all(g is not None for g in torch.autograd.grad(loss, trained(model)))
    assert model.gradients is None and all(block.gradients is None for block in model.blocks)


def test_adapters_that_are_off_write_nothing():
    model = make_model()
    gradients = FlatGradients(model)
    inputs = make_inputs(1, 3, 4)
    inputs["hidden_states"].requires_grad_()
    with without_adapters(model):
        model(**inputs).sample.square().mean().backward()
    gradients.take()
    gradients.hand_over()
    assert inputs["hidden_states"].grad is not None
    assert all(p.grad is None for p in trained(model))


def with_graphs(model, made=capture):
    """Graphs of the emulator, in memory that they share."""
    pool = Pool()
    model.graphs = graphs.StepGraphs(model, lambda *args: made(*args, pool=pool))
    return model


@pytest.mark.parametrize("targets", [EVERYTHING, SOME], ids=["all", "some"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_steps(monkeypatch, targets, micro_batches):
    """Two shapes in turn, so that graphs of both write to the same buffer."""
    see_every_op(monkeypatch)
    options = {"count": 12 // micro_batches, "tokens": ((3, 4), (2, 5))}
    model = with_graphs(make_model(targets))
    actual = steps(model, micro_batches, flat=True, **options)
    assert model.graphs.replays == 2
    same(actual, steps(make_model(targets), micro_batches, flat=False, **options))


def test_a_graph_that_does_not_write_the_buffer_is_noticed(monkeypatch):
    see_every_op(monkeypatch)
    model = make_model()

    def captured_elsewhere(blocks, samples, pool):
        """A graph that writes the gradients to places of its own."""
        own = [block.gradients for block in model.blocks]
        for block, gradients in zip(model.blocks, own, strict=True):
            places = {t: torch.empty_like(t) for t in gradients.trained}
            block.gradients = GradientPlaces(gradients.trained, places)
        replay = capture(blocks, samples, pool=pool)
        for block, gradients in zip(model.blocks, own, strict=True):
            block.gradients = gradients
        return replay

    with pytest.raises(graphs.GraphDiffers):
        steps(with_graphs(model, captured_elsewhere), flat=True, count=5)
