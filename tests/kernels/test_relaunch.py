"""A launch that is made again: with other addresses, and as Triton's JIT would make it."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import DEVICE, randn

from fluxfast_kernels.dropout import dropout
from fluxfast_kernels.launch import hearing, pretend
from fluxfast_kernels.relaunch import FIRST, STREAM, current_stream, prepare


def with_addresses(arguments):
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def test_again_with_other_tensors():
    heard = []
    x, seed = randn(5, 48, seed=1), torch.tensor(7, device=DEVICE)
    with hearing(heard.append):
        expected = dropout(x, 0.5, seed)
    (launched,) = heard
    run, arguments = prepare(launched)
    arguments[STREAM] = current_stream(x.device)
    other, y = randn(5, 48, seed=2), torch.full_like(x, torch.nan)
    arguments[FIRST : FIRST + 3] = other.data_ptr(), y.data_ptr(), seed.data_ptr()
    run(*arguments)
    assert torch.equal(y, dropout(other, 0.5, seed)) and not torch.equal(y, expected)


def test_what_is_heard_is_ones_own_and_ends():
    heard, x = [], randn(2, 16, seed=1)
    with hearing(heard.append):
        dropout(x, 0.5, torch.tensor(7, device=DEVICE))
    dropout(x, 0.5, torch.tensor(7, device=DEVICE))
    assert len(heard) == 1


def test_inside_pretend_nothing_runs_again_either():
    heard, told, x = [], [], randn(2, 16, seed=1)
    with hearing(heard.append), pretend("sm_90", lambda *launch: told.append(launch)):
        dropout(x, 0.5, torch.tensor(7, device=DEVICE))
        run, arguments = prepare(heard[0])
        run(*arguments)
    (kernel, args, numbers), (again, args_again, numbers_again) = told
    assert kernel is again and len(args) == len(args_again) and numbers == numbers_again


# a process whose Triton compiles, and whose launcher takes down what it is called with
AS_THE_JIT = """
import torch
from fluxfast_bench.counted import mock_gpu
calls = []

class Launcher:
    def __init__(self, source, metadata):
        pass
    def __call__(self, *args):
        calls.append(args)

mock_gpu._has_cuda_driver = lambda: False
mock_gpu._NoLauncher = Launcher
mock_gpu.activate("sm_90")
from fluxfast_kernels import launch, relaunch
from fluxfast_kernels.dropout import dropout
from fluxfast_kernels.row_quant import row_quant
heard = []
x = torch.randn(6, 64).to(torch.bfloat16)
with launch.hearing(heard.append):
    dropout(x, 0.5, torch.tensor(3), 2)
    row_quant(x, "int8")
assert len(calls) == len(heard) == 2
for first, launched in zip(list(calls), heard):
    run, arguments = relaunch.prepare(launched)
    run(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments])
    again = calls[-1]
    assert len(first) == len(again), (first, again)
    for i, (a, b) in enumerate(zip(first, again)):
        a = a.data_ptr() if isinstance(a, torch.Tensor) else a
        # metadata and hooks: nobody wants to hear of a launch
        assert a == b or (i in (6, 7, 8) and b is None), (i, a, b)
assert not relaunch.watched()
from triton import knobs
knobs.runtime.launch_enter_hook.add(lambda metadata: None)
assert relaunch.watched()
"""


def test_the_compiled_kernel_is_called_as_the_jit_calls_it():
    pytest.importorskip("fluxfast_bench")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run(
        [sys.executable, "-c", AS_THE_JIT], env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
