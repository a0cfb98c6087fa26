"""A small model to stream, and engines that show what a real device would hide.

They show stale reads, early reads and broken copies.
"""

import random
import threading
import time

import torch

from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.memory.engine import Engine
from fluxfast.memory.stream import BlockStream
from small_flux import small_flux
from support import make_inputs

TARGETS = ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "ff.net.2", "norm1.linear"]
ROUTES = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 3}]


class LateEngine(Engine):
    """A copy leaves garbage (0xff, NaN in every float) until somebody waits for it."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.copies = 0
        self._pending = []
        self._lock = threading.RLock()

    def copy(self, source, target, after):
        with self._lock:
            target.fill_(255)
            self._pending.append((source, target))
            self.copies += 1
            return self.copies

    def wait(self, event):
        with self._lock:
            while self._pending and self.copies - len(self._pending) < event:
                source, target = self._pending.pop(0)
                target.copy_(source)

    def synchronize(self, event):
        self.wait(event)


class SlowEngine(LateEngine):
    """The same, and each copy takes a while to issue."""

    def __init__(self, seed=0):
        super().__init__()
        self._rng = random.Random(seed)

    def copy(self, source, target, after):
        time.sleep(self._rng.random() * 1e-3)
        return super().copy(source, target, after)


class FailingEngine(LateEngine):
    """Copy number `at`, counted from 0, raises once."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def copy(self, source, target, after):
        self._at -= 1
        if self._at == -1:
            raise OSError("the copy failed")
        return super().copy(source, target, after)


def make_model(format=None, routes=None, checkpointing=False):
    """A frozen base, packed as a run's is, and LoRA with nonzero B on linears of all kinds."""
    model = small_flux(format, TARGETS)
    pack_groups(model)
    if routes:
        model.set_routes(routes, seed=5)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def blocks_of(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def stream(model, engine=None, poison=True, **options):
    """Stream a model's blocks; with `poison` the tensors hold garbage between uses."""
    made = BlockStream(blocks_of(model), engine or LateEngine(), **options)
    made.watch(model)
    if poison:
        for block in made._blocks:
            block.host = [
                torch.full_like(view.view(torch.uint8), 255).view(view.dtype) for view in block.host
            ]
            block.bytes.point_at(block.host)
    return made


def step(model, seed=0):
    """Loss and gradients of a batch; the model's own gradients are restored."""
    if model.router is not None:
        model.router.generator.manual_seed(seed)
    out = model(**make_inputs(2, 3, 4, seed=seed)).sample
    out.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), grads


def same(actual, expected):
    """Output and every gradient, bit for bit."""
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    different = [
        name for name in expected[1] if not torch.equal(actual[1][name], expected[1][name])
    ]
    assert not different
    assert all(grad.isfinite().all() for grad in expected[1].values())


_resident = {}


def expected(format=None, routes=None, seed=0):
    key = (format, bool(routes), seed)
    if key not in _resident:
        _resident[key] = step(make_model(format, routes), seed)
    return _resident[key]
