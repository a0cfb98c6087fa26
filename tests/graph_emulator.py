"""CUDA graphs on the CPU: what torch is asked to do is written down once, and from then on done
again on the same memory.

A value that Python computed while it was written down stays what it was then, as in a graph, and so
does a tensor that was no input. Whoever reads a value back has to wait for the device, which a
capture does not allow. Graphs that share a `Pool` share memory as theirs do: what one keeps between
its forward and its backward is overwritten when another one is replayed.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxfast.model.graph_capture import capture_step
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


class EmulatedGraph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.recorder, self.before_replay = Recorder(), lambda: None

    def replay(self):
        self.before_replay()
        self.recorder.replay()


@contextlib.contextmanager
def emulated():
    """Inside, what `capture_step` asks CUDA for is done on the CPU."""
    cuda = {
        "CUDAGraph": EmulatedGraph,
        "graph": lambda graph, **how: graph.recorder,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in cuda.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield


def capture(module, samples, blocks=(), pool=None):
    """`capture_step`, whose graphs are replayed on the CPU."""
    with emulated():
        step = capture_step(module, samples, blocks, pool=None, stream=None)
    pool = pool or Pool()
    number = pool.add(
        (step.forward.recorder, step.backward.recorder),
        (*samples, step.out, step.dout, *tensors(step.gradients), *step.parameters),
    )
    step.forward.before_replay = lambda: pool.used_by(number)
    return step


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
