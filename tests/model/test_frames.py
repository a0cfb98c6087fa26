"""How many functions of ours stand between the model and a kernel.

A reader who follows a block down to a kernel hops through them one by one. What counts is our own
frames on Python's stack, from `FluxTransformer.forward` to `launch`, both included. They were
15 and 22 before they were counted. Three of them are `run_forward` and the pure functions that it
is given, which launch plans record, and one is the tape's.
"""

import sys

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.checkpoint.empty_model import linears, quantize_empty
from fluxfast.model.fused_double import DoubleBlockFunction
from fluxfast.ops.device import pretend
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import KEPT
from fluxfast_kernels import launch as launch_module
from support import SMALL, make_inputs

MOST = {"modulated_layer_norm_fwd": 11, "dequant_int4": 16}


@pytest.fixture(scope="module")
def stacks():
    """By the kernel's host function, our own frames down to its first launch."""
    with torch.device("meta"):
        model = FluxTransformer(**SMALL).requires_grad_(False).train()
        quantize_empty(model, FORMATS["int4"], linears(model, KEPT), torch.float32)
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(1, 3, 5).items()}
    found = {}

    def on_launch(kernel, args, numbers):
        names, frame = [], sys._getframe(1)
        while frame is not None and frame.f_code is not FluxTransformer.forward.__code__:
            if frame.f_globals.get("__name__", "").startswith(("fluxfast.", "fluxfast_kernels.")):
                names.append(frame.f_code)
            frame = frame.f_back
        assert frame is not None and names[0] is launch_module.launch.__code__
        # modulation, which a run computes ahead, calls its linears as modules outside of blocks do
        if DoubleBlockFunction.forward.__code__ in names:
            found.setdefault(names[1].co_name, [frame.f_code, *names[::-1]])

    with pretend("sm_90", on_launch):
        model(**inputs)
    return found


@pytest.mark.parametrize("kernel", MOST)
def test_the_way_to_a_kernel_is_short(stacks, kernel):
    frames = stacks[kernel]
    assert len(frames) <= MOST[kernel], " > ".join(code.co_name for code in frames)
