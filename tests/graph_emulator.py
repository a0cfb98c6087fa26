"""CUDA graphs on the CPU: what torch is asked to do is written down once, and from then on done
again on the same memory.

A value that Python computed while it was written down stays what it was then, as in a graph, and so
does a tensor that was no input. Whoever reads a value back has to wait for the device, which a
capture does not allow. Graphs that share a `Pool` share memory as theirs do: what one keeps between
its forward and its backward is overwritten when another one is replayed.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast.ops import registration

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in READS, f"{func} waits for the device"
        made = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        for func, args, kwargs, made in self._calls:
            # memory that is taken, and other views of it, stay where they are
            if func.is_view or "empty" in func._schema.name or func._schema.name == "aten::detach":
                continue
            again = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for old, new in zip(tensors(made), tensors(again), strict=True):
                old.copy_(new)

    def made(self):
        """Storages, by address, that the calls took for themselves."""
        storages = {}
        for _, args, kwargs, made in self._calls:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for t in tensors(made):
                storage = t.untyped_storage()
                if storage.data_ptr() not in given:
                    storages[storage.data_ptr()] = storage
        return storages


class Pool:
    """The memory of several graphs."""

    def __init__(self):
        self._of = []

    def add(self, recorders, kept):
        """A graph's own memory; `kept` are its inputs, its output and its gradients, which nobody
        else is given.
        """
        keep = {t.untyped_storage().data_ptr() for t in kept}
        own = {
            address: s
            for recorder in recorders
            for address, s in recorder.made().items()
            if address not in keep
        }
        self._of.append(own)
        return len(self._of) - 1

    def used_by(self, number):
        for other, storages in enumerate(self._of):
            if other != number:
                for storage in storages.values():
                    # 0xFF in every byte is a NaN of every floating-point type
                    storage.fill_(0xFF)


def tensors(made):
    return [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]


def capture(module, samples, pool=None):
    """As torch.cuda.make_graphed_callables does it."""
    parameters, forward, backward = tuple(module.parameters()), Recorder(), Recorder()
    with forward:
        out = module(*samples)
    dout = torch.empty_like(out)
    with backward:
        grads = torch.autograd.grad(out, parameters, dout, allow_unused=True)
    pool = pool or Pool()
    number = pool.add(
        (forward, backward),
        (*samples, out, dout, *(g for g in grads if g is not None), *parameters),
    )

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            for sample, value in zip(samples, inputs, strict=False):
                sample.copy_(value)
            pool.used_by(number)
            forward.replay()
            return out.detach()

        @staticmethod
        def backward(ctx, d):
            dout.copy_(d)
            backward.replay()
            return (
                *[None] * len(samples),
                *(None if grad is None else grad.detach() for grad in grads),
            )

    return lambda *inputs: Graphed.apply(*inputs, *parameters)


def see_every_op(monkeypatch):
    """What torch does not hear of otherwise is called as the op that it is registered as."""
    plain, made = registration.PLAIN, registration._made

    def run_plain(*args):
        # what an op does is seen as that op alone
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(registration, "PLAIN", plain)
            return made(*args)

    monkeypatch.setattr(registration, "PLAIN", ())
    monkeypatch.setattr(registration, "_made", run_plain)
