"""A step never waits for the device: counted on one that notices, where a value can't be read and
each copy is seen.

Meta tensors stand for a GPU's. Reading one raises an error, so a step that ends has read nothing;
and a copy from the host that is not asynchronous, or whose source was not made ready for it, is
written down.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast import FluxTransformer
from fluxfast.adapters.lora import add_lora
from fluxfast.data.batches import Batch
from fluxfast.model import pinned
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.train import objective
from fluxfast.train.objective import Objective
from fluxfast.train.optim import build_optimizer, clip_gradients
from support import SMALL, randomise

META = torch.device("meta")
TREAD = {
    "tread_config": {
        "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]
    }
}
# numbers that are cheaper to send from ordinary memory, which CUDA copies before the call returns
FEW_BYTES = 64 << 10


class Copies(TorchDispatchMode):
    """The copies from the CPU to the device: all, and those that somebody would wait for."""

    def __init__(self, ready):
        super().__init__()
        self.ready, self.seen, self.waiting = ready, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and args[source].is_cpu and out.is_meta:
            self.seen += 1
            asynchronous = (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])
            tensor = args[source]
            if not asynchronous or (
                tensor.nbytes > FEW_BYTES and tensor.data_ptr() not in self.ready
            ):
                self.waiting.append((func._schema.name, list(tensor.shape)))
        return out


@pytest.fixture
def ready(monkeypatch):
    """Addresses of what was pinned: as for a GPU, each in memory of its own."""
    kept = {}

    def pin(tensor, device):
        assert tensor.is_cpu and device == META
        copy = tensor.clone()
        kept[copy.data_ptr()] = copy
        return copy

    # torch knows no autocast of meta tensors, not even that it is off
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    for module in (pinned, objective):
        monkeypatch.setattr(module, "pin", pin)
    monkeypatch.setattr("fluxfast.model.routing.pin", pin)
    monkeypatch.setattr("fluxfast.model.modulation.pin", pin)
    return kept


def small_model(ahead):
    model = FluxTransformer(**SMALL | {"in_channels": 64, "guidance_embeds": True})
    randomise(model)
    model.to(torch.bfloat16)
    add_lora(model, targets="all", rank=3)
    if ahead:
        # as a run does: these weights stay on the host when the others go to the device
        model.set_modulation_ahead(True)
    return model.to(META).train()


def batch(regularisation):
    g = torch.Generator().manual_seed(0)
    made = {
        "latents": (2, 16, 32, 48),
        "prompt_embeds": (2, 512, 24),
        "pooled_prompt_embeds": (2, 20),
    }
    return Batch(
        **{name: torch.randn(shape, generator=g).bfloat16() for name, shape in made.items()},
        attention_mask=torch.ones(2, 512, dtype=torch.bool),
        captions=["a", "b"],
        files=["a.png", "b.png"],
        dataset="photos",
        is_regularisation_data=regularisation,
        timestep_sampling_offset=0.0,
    )


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize(
    ("settings", "regularisation"),
    [
        ({}, False),
        (TREAD | {"loss_type": "huber", "flux_guidance_mode": "random-range"}, False),
        ({"lora_dropout": 0.1, "grad_clip_method": "value", "gradient_checkpointing": False}, True),
    ],
    ids=["plain", "tread-huber", "teacher"],
)
def test_a_step_waits_for_nothing(write_config, ready, settings, regularisation, ahead):
    from fluxfast.config.run import load_config

    config = load_config(write_config(optimizer="torch-adamw", **settings))
    model = small_model(ahead)
    if config.tread_config:
        model.set_routes([route.model_dump() for route in config.tread_config.routes])
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = FlatGradients(model)
    optimizer = build_optimizer("torch-adamw", parameters, lr=1e-3)
    made = Objective(config, model, 0, {})
    example = made.example(batch(regularisation), 3)
    # the optimiser's first step makes its states
    for counted in (False, True):
        copies = Copies(ready)
        with copies:
            loss = made.loss(example)
            loss.backward()
            gradients.take()
            gradients.hand_over()
            norm = clip_gradients(gradients.buffers, config.grad_clip_method, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if counted:
            assert loss.is_meta and norm.is_meta
            assert copies.seen >= 3
            assert copies.waiting == []


def test_the_device_notices(ready):
    copies, on_device = Copies(ready), torch.empty(3, device=META)
    with copies:
        torch.ones(3).to(META)
        on_device.copy_(torch.ones(3))
        torch.ones(3).to(META, non_blocking=True)
        torch.ones(FEW_BYTES).to(META, non_blocking=True)
        with pytest.raises(RuntimeError):
            on_device[0].item()
    assert copies.seen == 4 and len(copies.waiting) == 3


def test_numbers_are_read_back_when_they_are_asked_for(monkeypatch):
    """On a GPU: copied behind what made them, into pinned memory, and waited for by an event."""
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    class Landing(torch.Tensor):
        def copy_(self, source, non_blocking):
            assert non_blocking
            calls.append("copy")
            return super().copy_(source.as_subclass(torch.Tensor))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(pinned, "pin", lambda tensor, device: tensor.as_subclass(Landing))
    monkeypatch.setattr(
        torch, "stack", lambda numbers: torch.tensor([n.item() for n in numbers]).as_subclass(OnGpu)
    )
    readback = pinned.Readback(torch.tensor(1.5), torch.tensor(2.0, dtype=torch.bfloat16))
    assert calls == ["copy", "record"]
    assert readback.read() == [1.5, 2.0] and calls == ["copy", "record", "synchronize"]
