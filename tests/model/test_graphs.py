"""A step as graphs: captured once a shape, it gives what the step gives that is run, whatever
changes between steps.
"""

import threading

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.model import graphs
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.graph_capture import stand_ins
from fluxfast.model.graphs import (
    STEPS_RUN_FIRST,
    GraphDiffers,
    StepGraphs,
    what_failed,
    why_not,
)
from fluxfast.model.pinned import pin
from graph_emulator import Pool, capture, see_every_op
from small_flux import small_flux
from support import make_inputs

TARGETS = ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "ff.net.2", "x_embedder"]
ROUTES = [
    {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 1},
    {"selection_ratio": 0.4, "start_layer_idx": 2, "end_layer_idx": -1},
]


def make_model(*, norms=False, dropout=0.0, storage=None):
    model = small_flux(storage, TARGETS + (["norm1.linear", "norm.linear"] if norms else []))
    for module in model.modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    return model


def train(model, inputs):
    """Losses of steps on these inputs, and the adapters that they end with; every step changes the
    weights.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.01), []
    for step in inputs:
        loss = model(**step).sample.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach().clone() for p in parameters]


# run, captured, compared and replayed, replayed
STEPS = STEPS_RUN_FIRST + 3


def steps(count=STEPS):
    """`count` steps of each of two shapes in turn, other values each time."""
    return [
        make_inputs(2, *((3, 4) if seed % 2 else (2, 5)), seed=seed) for seed in range(2 * count)
    ]


def one_shape(count=STEPS):
    return steps(count)[::2]


class Counting(StepGraphs):
    """Graphs of the emulator, in memory that they share."""

    def __init__(self, model, **options):
        self.captures, self.said, pool = 0, [], Pool()

        def counted(*args):
            self.captures += 1
            return capture(*args, model.blocks, pool)

        super().__init__(model, counted, say=self.said.append, **options)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("routes", [None, ROUTES], ids=["plain", "tread"])
@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
def test_replays_are_the_steps_themselves(policy, routes, ahead, monkeypatch):
    see_every_op(monkeypatch)

    def make():
        model = make_model(norms=not ahead)
        model.set_modulation_ahead(ahead)
        model.set_routes(routes, seed=5)
        model.set_recompute(policy)
        return model

    expected = train(make(), steps())
    model = make()
    model.graphs = Counting(model)
    losses, adapters = train(model, steps())
    assert losses == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(adapters, expected[1], strict=True))
    assert model.graphs.captures == 2 and model.graphs.replays == 2
    assert len(model.graphs.said) == 1 and "steps are replayed" in model.graphs.said[0]


def test_the_mask_on_padding_is_an_input(monkeypatch):
    """A replayed step masks what its own batch says; a batch without a mask has its own graph."""
    see_every_op(monkeypatch)

    def masked():
        given = one_shape(STEPS + 1)
        for length, step in enumerate(given):
            mask = torch.arange(step["encoder_hidden_states"].shape[1]) < 1 + length % 3
            step["text_mask"] = mask.expand(len(step["hidden_states"]), -1).contiguous()
        return given + one_shape()

    expected = train(make_model(), masked())
    model = make_model()
    model.graphs = Counting(model)
    losses, adapters = train(model, masked())
    assert losses == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(adapters, expected[1], strict=True))
    assert model.graphs.captures == 2 and model.graphs.replays == 2


@pytest.mark.parametrize(
    ("storage", "compute", "outliers"),
    [("int8", "int8", 0), ("nf4", "same", 0), ("int4", "int8", 2)],
)
def test_replays_of_a_quantised_base(storage, compute, outliers, monkeypatch):
    see_every_op(monkeypatch)

    def make():
        model = make_model(storage=storage)
        model.set_compute(compute, outliers)
        return model

    expected = train(make(), steps())
    model = make()
    model.graphs = Counting(model)
    assert train(model, steps())[0] == expected[0]
    assert model.graphs.replays == 2


def test_replays_in_bfloat16(monkeypatch):
    """Weights, adapters and what goes in and comes out in 16 bits."""
    see_every_op(monkeypatch)
    inputs = [{k: x if "ids" in k else x.bfloat16() for k, x in step.items()} for step in steps()]
    expected = train(make_model().to(torch.bfloat16), inputs)
    model = make_model().to(torch.bfloat16)
    model.graphs = Counting(model)
    losses, adapters = train(model, inputs)
    assert (
        losses == expected[0] and adapters[0].dtype == torch.bfloat16 and model.graphs.replays == 2
    )
    assert all(torch.equal(a, b) for a, b in zip(adapters, expected[1], strict=True))


@pytest.mark.parametrize("policy", ["none", "full"])
def test_each_replay_draws_its_own_dropout_masks(policy, monkeypatch):
    """The same masks as in steps that are run, and others in each step."""
    see_every_op(monkeypatch)
    same = [make_inputs(2, 3, 4, seed=1)] * STEPS

    def losses(replayed):
        model = make_model(dropout=0.4)
        model.set_recompute(policy)
        if replayed:
            model.graphs = Counting(model)
        torch.manual_seed(11)
        # the weights stay, so that nothing but the masks can change a loss
        found = [model(**step).sample.square().mean() for step in same]
        return model, [loss.item() for loss in found]

    _, expected = losses(False)
    model, actual = losses(True)
    assert actual == expected and len(set(actual)) == STEPS and model.graphs.replays == 1
    torch.manual_seed(11)
    run = make_model(dropout=0.4)
    run.set_recompute(policy)
    wanted = train(run, steps())
    torch.manual_seed(11)
    replaying = make_model(dropout=0.4)
    replaying.set_recompute(policy)
    replaying.graphs = Counting(replaying)
    losses_of_steps, adapters = train(replaying, steps())
    assert losses_of_steps == wanted[0] and replaying.graphs.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(adapters, wanted[1], strict=True))


def wrong_in_backward(*args, **kwargs):
    replay = capture(*args, **kwargs)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * 1.01

    return lambda *inputs: Wrong.apply(replay(*inputs))


def deaf_to_an_input(*args, **kwargs):
    """A graph that goes on with the text that it was captured with."""
    replay, (_, text, *_) = capture(*args, **kwargs), args[1]
    text = text.clone()
    return lambda img, _, *rest: replay(img, text, *rest)


def that_goes_wrong(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("wrong", [wrong_in_backward, deaf_to_an_input, that_goes_wrong])
def test_a_graph_made_wrong_is_found_and_the_steps_are_run(monkeypatch, wrong):
    see_every_op(monkeypatch)
    expected = train(make_model(), one_shape())
    model, said = make_model(), []
    model.graphs = StepGraphs(model, wrong, optional=True, say=said.append)
    losses, adapters = train(model, one_shape())
    assert model.graphs is None and losses == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(adapters, expected[1], strict=True))
    (line,) = said
    assert line.startswith("CUDA graphs: off, and steps are run: ")
    assert ("out of memory" if wrong is that_goes_wrong else "a replayed step's output is") in line
    # asked for by name, it is no choice of ours
    model = make_model()
    model.graphs = StepGraphs(model, wrong)
    with pytest.raises(torch.OutOfMemoryError if wrong is that_goes_wrong else GraphDiffers):
        train(model, one_shape())


def test_weights_as_they_were_captured_are_noticed(monkeypatch):
    """The step that is compared comes after an update: a graph that has taken a copy of the weights
    differs.
    """
    see_every_op(monkeypatch)

    def of_a_copy(blocks, samples):
        copied = torch.nn.ParameterList(
            [p.detach().clone().requires_grad_() for p in blocks.trainable]
        )

        class Copy(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.trainable = copied

            def forward(self, *inputs):
                live = [p.data for p in blocks.trainable]
                for p, old in zip(blocks.trainable, copied, strict=True):
                    p.data = old.data
                try:
                    return blocks(*inputs)
                finally:
                    for p, data in zip(blocks.trainable, live, strict=True):
                        p.data = data

        return Copy()

    model = make_model()
    model.graphs = StepGraphs(model, of_a_copy)
    with pytest.raises(GraphDiffers):
        train(model, one_shape())


def test_only_so_many_sizes_are_captured(monkeypatch):
    see_every_op(monkeypatch)
    monkeypatch.setattr(graphs, "MOST_SHAPES", 1)
    expected = train(make_model(), steps())
    model = make_model()
    model.graphs = Counting(model)
    assert train(model, steps())[0] == expected[0]
    assert model.graphs.captures == model.graphs.replays == 1
    assert any("1 sizes are replayed, the others are run" in line for line in model.graphs.said)


def test_no_thread_pins_memory_during_a_capture(monkeypatch):
    """The threads that look ahead ask CUDA for pinned memory, which a capture, whoever captures,
    forbids.
    """
    see_every_op(monkeypatch)
    pinned = threading.Event()
    thread = threading.Thread(
        target=lambda: (pin(FakeGpuTensor(), torch.device("cuda")), pinned.set())
    )

    class FakeGpuTensor:
        def pin_memory(self):
            return self

    def watching(*args):
        thread.start()
        assert not pinned.wait(0.2)
        return capture(*args)

    model = make_model()
    model.graphs = StepGraphs(model, watching)
    train(model, one_shape(STEPS_RUN_FIRST + 1))
    assert pinned.wait(10)
    thread.join()


def test_the_emulator_would_show_a_value_that_is_no_input(monkeypatch):
    """A scale that changes after the capture is not seen by replays: `set_cuda_graphs` says that it
    must not.
    """
    see_every_op(monkeypatch)

    def losses(graphs):
        model = make_model()
        if graphs:
            model.graphs = Counting(model)
        found = [train(model, one_shape())[0]]
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] *= 2
        return [*found, train(model, one_shape(1))[0]]

    run, replayed = losses(False), losses(True)
    assert run[0] == replayed[0] and run[1] != replayed[1]


def test_the_emulator_would_show_memory_that_two_graphs_share(monkeypatch):
    """A forward whose backward comes only after another shape's forward finds its activations
    overwritten.
    """
    see_every_op(monkeypatch)
    model = make_model()
    model.graphs = Counting(model)
    train(model, steps())
    first, second = (model(**step).sample.square().mean() for step in steps(1))
    second.backward()
    first.backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_gradients_are_added_where_there_are_some(monkeypatch):
    see_every_op(monkeypatch)

    def gradients(graphs):
        model = make_model()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if graphs:
            model.graphs = Counting(model)
            for p in parameters:
                p.grad = torch.zeros_like(p)
        for step in one_shape():
            model(**step).sample.square().mean().backward()
        assert not graphs or model.graphs.replays == 1
        return [p.grad for p in parameters]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_what_is_no_training_step_runs_as_ever():
    model = make_model()
    model.graphs = Counting(model)
    inputs = make_inputs(1, 2, 3)
    with torch.no_grad():
        model(**inputs)
    model(**inputs, joint_attention_kwargs={"scale": 0.5})
    model.eval()
    model(**inputs)
    assert model.graphs.captures == 0


def test_an_input_that_wants_a_gradient_is_refused():
    model, inputs = make_model(), make_inputs(1, 2, 3)
    model.graphs = Counting(model)
    inputs["encoder_hidden_states"].requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient"):
        model(**inputs)
    assert model.graphs.captures == 0


def test_what_cannot_be_captured_is_named(monkeypatch):
    model = make_model()
    with pytest.raises(
        ValueError, match="CUDA graphs: the model is on cpu, and only a GPU has them"
    ):
        model.set_cuda_graphs(True)
    monkeypatch.setattr(FluxTransformer, "device", torch.device("cuda"))
    assert why_not(model) is None
    model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda *_: None)
    assert why_not(model) == "a linear of its blocks has to be called as it is"
    model.transformer_blocks[0].residency = object()
    assert why_not(model).startswith("its blocks are streamed")


def accumulators(out):
    """The tensors at which autograd would leave gradients."""
    found, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        left += [edge for edge, _ in node.next_functions if edge is not None]
        if hasattr(node, "variable"):
            found.add(node.variable)
    return found


@pytest.mark.parametrize("flat", [False, True], ids=["autograd's", "flat"])
def test_autograd_meets_no_parameter_of_a_fused_block_in_a_capture(flat):
    """Its node of an earlier step, which a loss keeps alive, belongs to another stream."""
    model = small_flux(None, ["to_q", "to_v", "proj_mlp", "ff.net.2"])
    if flat:
        FlatGradients(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = one_shape(1)[0]
    loss = model(**inputs).sample.square().mean()
    assert accumulators(loss) <= set(parameters)
    with stand_ins(model.blocks, parameters) as standing:
        inside = model(**inputs).sample.square().mean()
        met = accumulators(inside)
        assert met and not met & set(parameters)
        assert all(standing[p].data_ptr() == p.data_ptr() for p in parameters)
        given = torch.autograd.grad(inside, list(standing.values()), allow_unused=True)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    for grad, own in zip(given, expected, strict=True):
        assert grad is own is None or torch.equal(grad, own)
    assert accumulators(model(**inputs).sample) <= set(parameters)


def test_the_first_error_is_told_too():
    """Of a capture that was given up, CUDA says that it was, and not why."""
    error = RuntimeError("given up")
    error.__context__ = ValueError("a kernel\nwas loaded")
    assert what_failed(error) == "given up; first: a kernel was loaded"
    assert what_failed(RuntimeError()) == "RuntimeError"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
@pytest.mark.parametrize(
    ("routes", "storage", "compute"),
    [(None, None, "same"), (ROUTES, None, "same"), (None, "int8", "int8")],
    ids=["plain", "tread", "int8"],
)
def test_on_a_gpu(routes, storage, compute):
    """The loss of the step before is there while a step is captured, as in most training loops."""

    def result(graphs):
        model = make_model(storage=storage).cuda()
        model.set_compute(compute)
        model.set_routes(routes, seed=5)
        model.set_cuda_graphs(graphs)
        return train(model, [{k: v.cuda() for k, v in step.items()} for step in steps()])

    expected, actual = result(False), result(True)
    # sums that atomic additions may have in another order
    assert torch.allclose(torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=1e-4)
    assert all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(actual[1], expected[1], strict=True)
    )
