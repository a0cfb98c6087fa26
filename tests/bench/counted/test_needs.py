"""The memory that a contestant is expected to take: ours by the plan, the peers' by a count."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from fluxfast.adapters.lora import add_lora
from fluxfast.memory.live_bytes import LiveBytes
from fluxfast_bench.counted.meta_step import RANK, as_on_gpu, build, forward_backward, inputs_of
from fluxfast_bench.counted.needs import PEER_KEEPS, PEER_WORKS, bytes_needed
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.step.contestants import TARGETS, Setup
from fluxfast_bench.step.worker import CONTESTANTS

GIB = 2**30
LONG, SHORT = SHAPES["1024px-b1"], SHAPES["512px-b1"]


def setup(recompute="full", *shapes):
    return Setup(shapes or (LONG,), recompute, 16, "torch-adamw", torch.device("cuda"))


def need(name, *args):
    return bytes_needed(CONTESTANTS[name], setup(*args)) / GIB


def peer_peak(doubles, singles, recompute):
    """The peak of diffusers' blocks with PEFT at FLUX.1's width, in [tokens, dim] tensors.

    What was there before is not in it.
    """
    shape = Shape("blocks", "flux", 32, 512, 1).with_model(
        num_layers=doubles, num_single_layers=singles
    )
    model = build(FluxTransformer2DModel, shape)
    add_lora(model, targets=TARGETS, rank=RANK, dtype=torch.bfloat16)
    if recompute == "full":
        model.enable_gradient_checkpointing()
    inputs, live = inputs_of(shape), LiveBytes()
    with as_on_gpu(lambda *_: None), live:
        live.hold([*model.train().parameters(), *model.buffers(), *inputs.values()])
        before = live.live
        forward_backward(model, inputs)
    return (live.peak - before) / (shape.tokens * shape.dim * 2)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_peer_keeps_what_was_counted(recompute):
    one, double, single = (peer_peak(*blocks, recompute) for blocks in ((1, 1), (2, 1), (1, 2)))
    # adapters' gradients are in the peak, too
    assert (double - one, single - one) == pytest.approx(PEER_KEEPS[recompute], abs=0.1)
    assert one - (double - one) - (single - one) == pytest.approx(PEER_WORKS[recompute], abs=0.2)


def test_ours_keeps_a_dozen_tensors_a_block_where_nothing_is_recomputed():
    tensor = LONG.tokens * LONG.dim * 2 / GIB
    kept = need("fluxfast-int8+int8", "none") - need("fluxfast-int8+int8", "full")
    assert 7 < kept / tensor / 57 < 12
    # beside two contestants of the size of an int8 model it fits on an H100
    assert need("fluxfast-int8+int8+graphs", "none") + 2 * need("fluxfast-int8+int8") < 75


def test_the_largest_shape_counts_and_what_streams_does_not():
    assert (
        need("fluxfast", "none", SHORT, LONG)
        == need("fluxfast", "none", LONG)
        > need("fluxfast", "none", SHORT)
    )
    assert need("fluxfast-int4+int8+streamed") < 4 < need("fluxfast-int4+int8")
    # modulation's weights stay on the host, unless it is told to be on the device
    assert 2.5 < need("fluxfast-int8+int8+device-modulation") - need("fluxfast-int8+int8") < 3.5
    assert 22 < need("diffusers") < 26 and 12 < need("quanto-int8") < 15
