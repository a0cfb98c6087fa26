"""What a block takes of memory, measured on tensors without any: against what blocks are known to
keep, and wherever a plan is made.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fluxfast.adapters.presets import preset_targets
from fluxfast.memory import block_memory as measured
from fluxfast.memory.block_memory import block_memory, measure
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.ops import verdicts
from fluxfast.ops.device import pretend, pretending

# the first double and the first single block of FLUX.1
DOUBLE, SINGLE = 0, 19
TOKENS, RANK = 1536, 16
# one tensor of activations, image and text together
E = TOKENS * 3072 * 2
# the seeds of attention's kernel, weights of norms, a loss: a few of the allocator's 512 bytes
SMALL = 8 * 512


def workload(**changes):
    given = {
        "sizes": FluxSizes(),
        "tokens": (TOKENS,) * 57,
        "text_tokens": 512,
        "batch": 1,
        "storage": Storage(None),
        "targets": preset_targets("all+ffs"),
        "rank": RANK,
    }
    return Workload(**(given | changes))


@pytest.fixture
def forgotten():
    """Whatever is measured here is forgotten afterwards, as it was before."""
    for cached in (measure, block_memory):
        cached.cache_clear()
    yield
    for cached in (measure, block_memory):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("index", "recompute", "tensors", "narrow"),
    [
        # q, k and v, attention's output, the stream after it, the MLP's input; and whatever else is
        # computed again, the narrow halves of all linears' adapters
        (DOUBLE, "none", 3 + 1 + 1 + 4, 6),
        (SINGLE, "none", 3 + 4 + 1, 5),
        (DOUBLE, "selective", 1, 6),
        (SINGLE, "selective", 1, 5),
        (DOUBLE, "full", 0, 6),
        (SINGLE, "full", 0, 5),
    ],
)
@pytest.mark.parametrize(("format", "compute"), [(None, "same"), ("int8", "int8")])
def test_what_a_block_keeps(index, recompute, tensors, narrow, format, compute):
    found = block_memory(workload(storage=Storage(format), compute=compute), index, recompute)
    # beside it a log-sum-exp in fp32 for each head
    lse = 0 if recompute == "full" else TOKENS * 24 * 4
    expected = (1 + tensors) * E + narrow * TOKENS * RANK * 2 + lse
    assert found.input == E
    assert found.kept == pytest.approx(expected, abs=SMALL)


@pytest.mark.parametrize(("index", "inputs"), [(0, 1), (1, 2), (SINGLE, 2)])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_an_input_on_the_host_comes_back_for_backward(index, inputs, recompute):
    here, there = (block_memory(workload(), index, recompute, on_host) for on_host in (False, True))
    assert there.forward == here.forward
    assert here.kept - there.kept == E
    # the block's own, and that of the block before it, if there is one, on its way
    assert there.backward - here.backward == inputs * E


def test_who_recomputes_more_works_with_more():
    for index in (DOUBLE, SINGLE):
        none, selective, full = (
            block_memory(workload(), index, policy) for policy in ("none", "selective", "full")
        )
        assert none.kept > selective.kept > full.kept
        assert none.backward < selective.backward < full.backward
        # but for the room beside activations that backward overwrites
        assert selective.forward == full.forward == pytest.approx(none.forward, rel=0.005)


def test_weights_that_are_decoded_for_the_products_are_counted():
    plain = block_memory(workload(), DOUBLE, "full")
    decoded = block_memory(workload(storage=Storage("nf4")), DOUBLE, "full")
    # with room for the adapters beside them
    weights = 1.02 * 2 * (8 + 16) * 3072**2
    # with the room for adapters beside them
    assert 0.5 * weights < decoded.forward - plain.forward <= 1.03 * weights
    assert decoded.kept == plain.kept


def test_gradients_of_the_modulation_take_room():
    """Its gates want the products again that they multiply."""
    frozen, trained = (
        block_memory(workload(targets=targets), DOUBLE, "full")
        for targets in (("attn.to_q",), ("attn.to_q", "norm1.linear"))
    )
    assert trained.kept == frozen.kept
    assert trained.backward > frozen.backward


def test_without_an_adapter():
    bare = block_memory(workload(targets=("proj_out",)), DOUBLE, "selective")
    assert bare.kept == pytest.approx(2 * E + TOKENS * 24 * 4, abs=SMALL)


def test_two_samples_take_twice_as_much():
    one = block_memory(workload(), SINGLE, "full")
    two = block_memory(workload(batch=2), SINGLE, "full")
    assert two == pytest.approx([2 * amount for amount in one], rel=0.01)


def test_fp32_takes_twice_as_much():
    half, full = (block_memory(workload(storage=Storage(None, n)), SINGLE, "none") for n in (2, 4))
    assert full.input == 2 * half.input and full.kept > 1.9 * half.kept


def test_blocks_that_are_alike_are_measured_once(forgotten):
    for same in (workload(), workload(optimizer="adamw8bit")):
        for index in range(57):
            block_memory(same, index, "full")
    assert measure.cache_info().misses == 2


def test_nothing_is_left_behind(forgotten):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    block_memory(workload(storage=Storage("int4"), compute="int8"), DOUBLE, "none")
    assert torch.equal(torch.get_rng_state(), before)
    assert not pretending()


def test_what_failed_a_check_here_changes_nothing(forgotten):
    before = block_memory(workload(), SINGLE, "none")
    measure.cache_clear()
    try:
        verdicts.set_failed({(verdicts.FUSED_BLOCK, "triton"): "it was wrong"})
        assert block_memory(workload(), SINGLE, "none") == before
    finally:
        verdicts.set_failed({})


@pytest.mark.parametrize(("format", "compute"), [(None, "same"), ("int8", "int8"), ("nf4", "same")])
def test_kernels_that_are_asked_take_no_more(forgotten, monkeypatch, format, compute):
    """Ops that only say their shapes agree with the launchers, but for the launchers' scratch."""
    pytest.importorskip("triton")
    stored = workload(storage=Storage(format), compute=compute)
    cases = [(i, recompute) for i in (DOUBLE, SINGLE) for recompute in ("none", "full")]
    by_shapes = [block_memory(stored, *case) for case in cases]
    launches = []
    monkeypatch.setattr(
        measured,
        "pretend",
        lambda arch, on_launch: pretend(arch, lambda kernel, *_: launches.append(kernel)),
    )
    measure.cache_clear()
    by_launchers = [block_memory(replace(stored), *case) for case in cases]
    assert launches
    for found, expected in zip(by_shapes, by_launchers, strict=True):
        # the first launches make tables and semaphores, which all later ones share
        assert found[:2] == pytest.approx(expected[:2], abs=1 << 16)
        # the parts of sums that several programs share
        scratch = 1.2 * E
        for few, all_of_it in zip(found[2:], expected[2:], strict=True):
            assert -0.01 * few < all_of_it - few < 0.01 * few + scratch


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
from test_block_memory import figures

print(figures())
assert not [name for name in sys.modules if name.startswith("triton.")]
"""


def figures():
    """The memory of some blocks whose products read weights in different ways."""
    stored = [(None, "same"), ("int8", "int8"), ("int8", "same"), ("nf4", "int8")]
    workloads = [workload(storage=Storage(format), compute=c) for format, c in stored]
    return [tuple(block_memory(w, i, "full")) for w in workloads for i in (DOUBLE, SINGLE)]


def test_a_plan_needs_no_triton():
    """As on macOS and Windows, for which there is none."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(figures())
