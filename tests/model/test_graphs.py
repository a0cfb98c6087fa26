"""A step as graphs: captured once a shape, it gives what the step gives that is run, whatever changes between steps."""

import threading

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.model.graphs import StepGraphs, why_not
from fluxfast.model.pinned import pin
from graph_emulator import capture, see_every_op
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
    """Losses of steps on these inputs, and the adapters that they end with; every step changes the weights."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.01), []
    for step in inputs:
        loss = model(**step).sample.square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach().clone() for p in parameters]


def steps():
    """Two shapes in turn, other values each time."""
    return [make_inputs(2, *((3, 4) if seed % 2 else (2, 5)), seed=seed) for seed in range(6)]


class Counting(StepGraphs):
    def __init__(self, model):
        self.captures = 0

        def counted(*args):
            self.captures += 1
            return capture(*args)

        super().__init__(model, counted)


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
    assert model.graphs.captures == 2


@pytest.mark.parametrize(("storage", "compute", "outliers"), [("int8", "int8", 0), ("nf4", "same", 0), ("int4", "int8", 2)])
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


def test_no_thread_pins_memory_during_a_capture(monkeypatch):
    """The threads that look ahead ask CUDA for pinned memory, which a capture, whoever captures, forbids."""
    see_every_op(monkeypatch)
    pinned = threading.Event()
    thread = threading.Thread(target=lambda: (pin(FakeGpuTensor(), torch.device("cuda")), pinned.set()))

    class FakeGpuTensor:
        def pin_memory(self):
            return self

    def watching(*args):
        thread.start()
        assert not pinned.wait(0.2)
        return capture(*args)

    model = make_model()
    model.graphs = StepGraphs(model, watching)
    model(**steps()[0]).sample.sum().backward()
    assert pinned.wait(10)
    thread.join()


def test_the_emulator_would_show_a_value_that_is_no_input(monkeypatch):
    """A scale that changes after the capture is not seen by replays: `set_cuda_graphs` says that it must not."""
    see_every_op(monkeypatch)

    def losses(graphs):
        model = make_model()
        if graphs:
            model.graphs = Counting(model)
        found = [train(model, steps()[:1])[0]]
        for module in model.modules():
            if hasattr(module, "scaling"):
                module.scaling["default"] *= 2
        return [*found, train(model, steps()[:1])[0]]

    run, replayed = losses(False), losses(True)
    assert run[0] == replayed[0] and run[1] != replayed[1]


def test_gradients_are_added_where_there_are_some(monkeypatch):
    see_every_op(monkeypatch)

    def gradients(graphs):
        model = make_model()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if graphs:
            model.graphs = Counting(model)
            for p in parameters:
                p.grad = torch.zeros_like(p)
        for step in steps()[:3]:
            model(**step).sample.square().mean().backward()
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
    model = make_model(dropout=0.1)
    with pytest.raises(ValueError, match="CUDA graphs: the model is on cpu, and only a GPU has them"):
        model.set_cuda_graphs(True)
    monkeypatch.setattr(FluxTransformer, "device", torch.device("cuda"))
    assert why_not(model) == "an adapter has a dropout, whose seed would be the same in every step"
    model = make_model()
    assert why_not(model) is None
    model.transformer_blocks[0].attn.to_k.register_forward_hook(lambda *_: None)
    assert why_not(model) == "a linear of its blocks has to be called as it is"
    model.transformer_blocks[0].residency = object()
    assert why_not(model).startswith("its blocks are streamed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a GPU's")
@pytest.mark.parametrize("routes", [None, ROUTES], ids=["plain", "tread"])
def test_on_a_gpu(routes):
    def result(graphs):
        model = make_model().cuda()
        model.set_routes(routes, seed=5)
        model.set_cuda_graphs(graphs)
        return train(model, [{k: v.cuda() for k, v in step.items()} for step in steps()])

    expected, actual = result(False), result(True)
    # sums that atomic additions may have in another order
    assert torch.allclose(torch.tensor(actual[0]), torch.tensor(expected[0]), rtol=1e-4)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(actual[1], expected[1], strict=True))
