"""The step-time model: what blocks do, counted, and what a GPU takes for it."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fluxfast.adapters.presets import preset_targets
from fluxfast.memory import block_work as counted
from fluxfast.memory import rates
from fluxfast.memory.block_work import block_work
from fluxfast.memory.budget import unsupported
from fluxfast.memory.gpus import GPUS, find_gpu
from fluxfast.memory.launched import Product
from fluxfast.memory.plan import candidates, fit, predict
from fluxfast.memory.rates import NAMES, Rate, rates_of
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.memory.step_time import PARTS, product_seconds, step_seconds
from fluxfast.model.apply import Choices
from fluxfast.ops import dispatch

POLICIES = ("none", "selective", "full")
# the first double and the first single block of FLUX.1
DOUBLE, SINGLE = 0, 19
D = 3072
pytestmark = pytest.mark.usefixtures("assumed_rates")

H200, RTX4090 = find_gpu("H200"), find_gpu("RTX 4090")


def workload(tokens=4608, **changes):
    given = {
        "sizes": FluxSizes(),
        "tokens": (tokens,) * 57,
        "text_tokens": 512,
        "batch": 1,
        "storage": Storage(None),
        "targets": preset_targets("all+ffs"),
        "rank": 16,
    }
    return Workload(**(given | changes))


def chosen(policy="full", **changes):
    return Choices((policy,) * 57, **({"modulation_ahead": True, "graphs": True} | changes))


def seconds(work, gpu=H200, **choices):
    return predict(work, chosen(**choices), gpu).total


@pytest.fixture
def other_rates(monkeypatch):
    """Have a rate of every GPU be so many times what it was."""
    forgotten = (rates_of, product_seconds, counted.block_work)
    from fluxfast.memory.step_time import block_seconds

    before = rates._assumed

    def change(name, factor):
        monkeypatch.setattr(
            rates,
            "_assumed",
            lambda gpu: {
                n: rate._replace(value=rate.value * (factor if n == name else 1))
                for n, rate in before(gpu).items()
            },
        )
        for cached in (*forgotten, block_seconds):
            cached.cache_clear()

    yield change
    monkeypatch.undo()
    for cached in (*forgotten, block_seconds):
        cached.cache_clear()


# what blocks do


@pytest.mark.parametrize("index", [DOUBLE, SINGLE])
@pytest.mark.parametrize("tokens", [575, 1536, 4608])
@pytest.mark.parametrize(("format", "compute"), [(None, "same"), ("int8", "int8"), ("nf4", "int8")])
def test_products_are_a_rooflines(index, tokens, format, compute):
    """12 D² multiply-adds a token forward and as many for the gradient of the input; what a policy
    recomputes of them (roofline.py: all but a double block's second MLP linear, or the last linear
    of a single one). Attention has 4 S² D forward, and the same again where it is recomputed.
    """
    work = workload(tokens, storage=Storage(format), compute=compute)
    forward = 2 * 12 * D * D * tokens
    again = {
        "none": 0,
        "selective": 8 if index == DOUBLE else 7,
        "full": 8 if index == DOUBLE else 7,
    }
    for policy in POLICIES:
        ahead, back = (
            sum(product.flops * count for (product, _), count in part.products.items())
            for part in block_work(work, index, policy, "sm_90")
        )
        # K-concatenation adds an adapter's rank to K, by at most 2 %
        assert ahead == pytest.approx(forward, rel=0.02)
        assert back == pytest.approx(forward * (1 + again[policy] / 12), rel=0.02)
    first, second = block_work(work, index, "full", "sm_90")
    attention = 4 * tokens**2 * D
    assert first.attention == second.attention == second.attention_backward == attention
    assert block_work(work, index, "selective", "sm_90")[1].attention == 0


def test_linears_side_by_side_are_one_product():
    forward, _ = block_work(
        workload(compute="int8", storage=Storage("int8")), SINGLE, "full", "sm_90"
    )
    products = {product for product, _ in forward.products}
    assert products == {
        Product("int8_persistent", (4608,), (D, D, D, 4 * D), D),
        Product("int8_persistent", (4608,), (D,), 5 * D),
    }


@pytest.mark.parametrize("index", [DOUBLE, SINGLE])
@pytest.mark.parametrize(("format", "compute"), [(None, "same"), ("int8", "int8"), ("nf4", "int8")])
def test_without_triton_it_is_nearly_the_same(monkeypatch, index, format, compute):
    """Ops that are counted call by call say what they read and write, not how."""
    pytest.importorskip("triton")
    work = workload(storage=Storage(format), compute=compute)
    by_launches = block_work(work, index, "full", "sm_90")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    for cached in (counted._count, block_work):
        cached.cache_clear()
    by_ops = block_work(work, index, "full", "sm_90")
    for cached in (counted._count, block_work):
        cached.cache_clear()
    for found, expected in zip(by_ops, by_launches, strict=True):
        flops, wanted = (
            sum(product.flops * count for (product, _), count in part.products.items())
            for part in (found, expected)
        )
        assert flops == pytest.approx(wanted, rel=0.02)
        assert found.attention == expected.attention
        # the copy of adapters into augmented weights is a launch, but no op
        assert expected.launches - found.launches in (0, 1)
        moved, wanted = (part.moved + sum(n for n, _ in part.thin) for part in (found, expected))
        assert moved == pytest.approx(wanted, rel=0.05)


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
from fluxfast.ops import dispatch

dispatch.HAS_TRITON = False
from test_step_time import H200, chosen, predict, workload

print(predict(workload(), chosen(), H200).total)
assert not [name for name in sys.modules if name.startswith("triton.")]
"""


def test_a_prediction_needs_no_triton():
    """As on macOS and Windows, for which there is none."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(seconds(workload()), rel=0.1)


# what it takes


@pytest.mark.parametrize(
    ("gpu", "pixels", "policy", "compute", "expected"),
    [
        ("H200", 1024, "full", "same", 0.377),
        ("H200", 512, "full", "same", 0.101),
        ("H200", 1024, "full", "int8", 0.267),
        ("RTX 4090", 1024, "full", "same", 1.88),
        ("RTX 4090", 512, "full", "int8", 0.252),
        ("RTX 3090", 1024, "full", "int8", 2.19),
    ],
)
def test_a_step_is_a_rooflines_and_what_waves_cost(gpu, pixels, policy, compute, expected):
    """tools/roofline.py has no waves, no gaps, and the rates of cuBLAS: a step is that at best, and
    half as much again at 512 px, where tiles leave multiprocessors idle.
    """
    storage = Storage("int8" if compute == "int8" else None)
    work = workload((pixels // 16) ** 2 + 512, compute=compute, storage=storage)
    found = seconds(work, find_gpu(gpu), policy=policy)
    assert 0.9 * expected < found < 1.5 * expected


def test_parts_add_up():
    time = predict(workload(), chosen(), H200)
    assert time.total == sum(getattr(time, part) for part in PARTS)
    assert all(getattr(time, part) >= 0 for part in PARTS)
    assert time.transfers == 0 and time.host == 0


def test_more_work_takes_longer():
    times = [seconds(workload(tokens)) for tokens in (600, 1024, 1536, 2560, 4608)]
    assert times == sorted(times) and len(set(times)) == len(times)
    assert seconds(workload(batch=2)) > 1.7 * seconds(workload())
    ranks = [seconds(workload(rank=rank)) for rank in (4, 16, 64, 256)]
    assert ranks == sorted(ranks)
    by_policy = [seconds(workload(), policy=policy) for policy in POLICIES]
    assert by_policy == sorted(by_policy)
    # decoding comes on top of the same products
    int8, nf4 = (seconds(workload(storage=Storage(f), compute="int8")) for f in ("int8", "nf4"))
    assert int8 < nf4 < 1.2 * int8


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_t")])
def test_a_lower_rate_takes_longer(other_rates, name):
    """Each rate has a share in the time of some step; seconds are the other way round."""
    compute = name if name in ("int8", "e4m3") else "same"
    storage = Storage({"int8": "int8", "e4m3": "fp8_e4m3"}.get(name), 4 if name == "fp32" else 2)
    work = workload(1536, compute=compute, storage=storage)
    graphs = name != "launch"
    choices = chosen(graphs=graphs, slots=2 if name == "link" else 0, use_stream=True)

    def taken():
        if name != "library":
            return predict(replace(work), choices, H200).total
        return product_seconds(Product("library", (4608,), (D,), D), 0, H200)

    before = taken()
    worse = 2 if name in ("launch", "gap") else 0.5
    other_rates(name, worse)
    assert taken() > before


def test_a_product_waits_for_its_bytes():
    """Sixteen rows read as much of the weight as 128 of them do."""
    few, more = (Product("half", (rows,), (D,), D) for rows in (16, 128))
    nbytes = 2 * D * D
    assert product_seconds(few, nbytes, RTX4090) >= nbytes / rates_of(RTX4090)["memory"].value
    assert product_seconds(few, nbytes, RTX4090) <= product_seconds(more, nbytes, RTX4090)


def test_a_product_that_a_gpu_has_not():
    with pytest.raises(ValueError, match="RTX 3090 has no tensor cores for e4m3"):
        product_seconds(Product("e4m3_t", (512,), (D,), D), 0, find_gpu("RTX 3090"))


def test_the_host_is_late_without_a_graph():
    work = workload(512, storage=Storage("int8"), compute="int8")
    graphed, eager = (predict(work, chosen(graphs=g), H200) for g in (True, False))
    assert eager.total == pytest.approx(eager.host) and eager.total > 1.2 * graphed.total
    # at 1024 px the GPU is the slower one
    large = workload(storage=Storage("int8"), compute="int8")
    assert seconds(large, graphs=True) == seconds(large, graphs=False)


def test_streaming_waits_where_blocks_compute_faster_than_they_come():
    slow, fast = (
        predict(workload(tokens), chosen(slots=2, use_stream=True), RTX4090)
        for tokens in (4608, 1536)
    )
    work = workload()
    link = rates_of(RTX4090)["link"].value
    copies = 2 * sum(work.block_weights) / link
    busy = fast.products + fast.attention + fast.memory
    # they are written to the device's memory, too, which nothing hides
    written = 2 * sum(work.block_weights) / rates_of(RTX4090)["memory"].value
    assert copies - busy <= fast.transfers < copies
    assert slow.transfers < fast.transfers
    assert predict(work, chosen(), RTX4090).transfers == 0
    # in line with the computing, all of it shows
    in_line = predict(work, chosen(slots=2), RTX4090)
    assert in_line.transfers == pytest.approx(copies + written)
    inputs = predict(work, chosen(slots=2, host_inputs=True), RTX4090)
    assert inputs.transfers > in_line.transfers


def test_blocks_that_fit_are_not_streamed():
    """A copy that computing hides still takes memory's time, so the room there is is used."""
    for format in ("int8", "nf4", "int2"):
        work = workload(storage=Storage(format), compute="int8")
        assert not fit(work, H200, 140 << 30).streams


def test_modulation_on_the_device_reads_its_weights():
    work = workload()
    ahead, on_device = (predict(work, chosen(modulation_ahead=a), H200) for a in (True, False))
    read = sum(work.modulation_weights) / rates_of(H200)["memory"].value
    assert on_device.memory - ahead.memory == pytest.approx(read)


def test_every_gpu_has_a_time_for_what_it_can_compute():
    for gpu in GPUS:
        for format, compute in ((None, "same"), ("int8", "int8"), ("fp8_e4m3", "e4m3")):
            if gpu.rate(compute):
                work = workload(1536, storage=Storage(format), compute=compute)
                assert 0.01 < seconds(work, gpu) < 60


def test_the_solver_asks_for_hundreds_of_times():
    """A budget's choices are as many as that, and each has to be quick: blocks are counted once."""
    work = workload(storage=Storage("int8"), compute="int8")
    assert len(list(candidates(work, RTX4090))) > 500
    fit(work, RTX4090, 12 << 30)
    misses = counted._count.cache_info().misses
    assert fit(replace(work), RTX4090, 11 << 30) is not None
    assert counted._count.cache_info().misses == misses


# rates


def test_every_rate_is_told_and_positive():
    for gpu in (gpu for gpu in GPUS if unsupported(gpu) is None):
        found = rates_of(gpu)
        assert found.keys() <= NAMES.keys()
        assert found.keys() >= {"half", "attention", "memory", "link", "launch", "gap"}
        assert all(rate.value > 0 and rate.source for rate in found.values())
        # a peak is a peak, and 16 bits are no faster than 8
        assert found["half"].value < found.get("int8", found["half"]).value * 1.01
        assert found["half"].value <= gpu.bf16 * 1e12
        assert found["memory"].value <= gpu.bandwidth * 1e9
        assert ("e4m3" in found) == bool(gpu.fp8)


def test_what_is_measured_takes_the_place_of_what_is_assumed(monkeypatch, tmp_path):
    stored = tmp_path / "rates.json"
    stored.write_text('{"H200": {"int8": {"value": 1.0e15, "source": "a test"}}}')
    monkeypatch.setattr(rates, "STORED", stored)
    rates_of.cache_clear()
    try:
        assert rates_of(H200)["int8"] == Rate(1e15, True, "a test")
        assert not rates_of(H200)["half"].measured
        assert not rates_of(find_gpu("H100"))["int8"].measured
        assert rates.told(H200).startswith("from measured rates (int8) and")
        assert rates.told(RTX4090) == "from assumed rates, none measured on such a GPU"
    finally:
        rates_of.cache_clear()


def test_step_seconds_is_of_the_choices_it_is_given():
    mixed = replace(chosen(), recompute=("none",) * 30 + ("full",) * 27)
    low, high = (seconds(workload(), policy=policy) for policy in ("none", "full"))
    assert low < step_seconds(workload(), mixed, H200).total < high
