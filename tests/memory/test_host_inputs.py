"""Blocks' inputs in host memory: right in any order, and buffers are neither shared nor lost."""

import random

import pytest
import torch

from fluxfast.memory.host_inputs import HostInputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(1,), (2, 63, 5), (7, 1000)])
def test_what_is_kept_comes_back(shape, dtype):
    inputs = HostInputs(CPU)
    x = (torch.randn(shape) * 100).to(dtype)
    kept = inputs.keep(x)
    inputs.keep(torch.zeros_like(x))
    back = inputs.fetch(kept)
    assert back.dtype == dtype and torch.equal(back, x)
    # once more, as with retain_graph=True
    assert torch.equal(inputs.fetch(kept), x)


def test_views_and_gradients():
    inputs = HostInputs(CPU)
    x = torch.randn(6, 4, requires_grad=True)
    kept = [inputs.keep(x.T), inputs.keep(x[::2]), inputs.keep(x)]
    for handle, value in zip(kept, (x.T, x[::2], x), strict=True):
        back = inputs.fetch(handle)
        assert torch.equal(back, value) and not back.requires_grad


def test_it_does_not_matter_what_becomes_of_the_tensor_it_came_from():
    inputs = HostInputs(CPU)
    handles, values = [], []
    for i in range(5):
        x = torch.full((3,), float(i))
        values.append(x.clone())
        handles.append(inputs.keep(x))
    x = torch.randn(3)
    # the last one may still be the tensor itself; those before it are not
    for handle in handles[:-1]:
        assert handle.on_device is None
    for handle, value in zip(reversed(handles), reversed(values), strict=True):
        assert torch.equal(inputs.fetch(handle), value)


def test_the_one_before_is_on_its_way():
    inputs = HostInputs(CPU)
    handles = [inputs.keep(torch.full((2,), float(i))) for i in range(3)]
    inputs.fetch(handles[2])
    assert handles[1].on_device is not None and handles[0].on_device is None
    inputs.fetch(handles[1])
    assert handles[1].on_device is None and handles[0].on_device is not None


def test_blocks_that_keep_two_get_both_ahead_and_leave_none_behind():
    inputs = HostInputs(CPU)
    blocks = [[inputs.keep(torch.full((2,), 2.0 * i + j)) for j in range(2)] for i in range(4)]
    for number in reversed(range(4)):
        for j, handle in enumerate(blocks[number]):
            assert torch.equal(inputs.fetch(handle), torch.full((2,), 2.0 * number + j))
        here = {(i, j) for i in range(4) for j in range(2) if blocks[i][j].on_device is not None}
        assert here == ({(number - 1, 0), (number - 1, 1)} if number else set())


def test_buffers_are_used_again():
    inputs = HostInputs(CPU)
    for _ in range(4):
        handles = [inputs.keep(torch.randn(100)) for _ in range(3)]
        for handle in reversed(handles):
            inputs.fetch(handle)
        # as an exception midway would leave it
        del handles, handle
    assert inputs.nbytes == 3 * 400


def test_any_order():
    rng = random.Random(0)
    inputs = HostInputs(CPU)
    kept = {}
    for i in range(400):
        action = rng.random()
        if action < 0.5 or not kept:
            x = torch.randn(rng.choice([4, 9]))
            kept[i] = (inputs.keep(x), x.clone())
        else:
            key = rng.choice(list(kept))
            handle, x = kept[key]
            assert torch.equal(inputs.fetch(handle), x)
            if action > 0.7:
                del kept[key], handle
    most = inputs.nbytes
    kept.clear()
    again = [inputs.keep(torch.randn(4)) for _ in range(3)]
    assert inputs.nbytes == most and len(again) == 3
