"""What a GPU's stored results say of the rates that the step-time model is made of.

Copies, attention and torch's 16-bit products are from `ceilings`; our kernels' products from
`sweep`, or where there is none from all those of a step in `profile`; what lies between launches
from `profile`. The rate of a product is the one at which the model gives the time that was
measured: it is that of the main loop, and what waves cost is not in it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast.memory.launched import Product
from fluxfast.memory.rates import rates_of, with_measured
from fluxfast.memory.step_time import product_seconds
from fluxfast_bench.counted.floor import ATTENTION_BACKWARD
from fluxfast_bench.ops.products import products_of
from fluxfast_bench.report.results import Result
from fluxfast_bench.shapes import SHAPES

# a step of which kernels fill less than this waits for the host
BUSY = 0.9
# the step whose wide products are int8's, and their kernels: thin products have others
IN_CODES = "fluxfast-int8+int8:full"
WIDE_KERNELS = ("persistent_matmul_kernel", "matmul_kernel")

# (a product, how often it comes, seconds)
Timed = tuple[Product, int, float]
# (value, the run that it is from) by the rate's name
Rates = dict[str, tuple[float, Result]]


def gpu_of(stored: Sequence[Result]) -> Gpu:
    """The GPU that results are of. Raises ValueError where they are of none in the table."""
    names = {r.data["conditions"]["device"] for r in stored if "cuda" in r.data["conditions"]}
    if len(names) != 1:
        raise ValueError(f"expected the results of one GPU, got those of {sorted(names) or 'none'}")
    return find_gpu(names.pop())


def measured(stored: Sequence[Result], gpu: Gpu) -> dict[str, dict[str, Any]]:
    """The rates that a GPU's results give, as `fluxfast.memory.rates.read` has them."""
    found: Rates = {}
    # what is later replaces what is earlier: newer runs, and sweeps after profiles
    for kind, rates in (("ceilings", _ceilings), ("profile", _profile), ("sweep", _sweep)):
        for result in sorted(stored, key=lambda r: r.date):
            if result.kind == kind:
                found |= {name: (value, result) for name, value in rates(result, gpu)}
    return {name: _entry(value, result) for name, (value, result) in sorted(found.items())}


def _entry(value: float, result: Result) -> dict[str, Any]:
    run = result.data["conditions"]
    source = f"{run['device']}, {run['date'][:10]}, {run['commit']}: `{run['command']}`"
    return {"value": float(f"{value:.4g}"), "source": source}


def _ceilings(result: Result, gpu: Gpu) -> Iterable[tuple[str, float]]:
    cases = result.data.get("ceilings", {})
    if copies := [rates["copy"] for rates in cases.values() if "copy" in rates]:
        yield "memory", sum(copies) / len(copies)
    if links := [rates["link"] for rates in cases.values() if "link" in rates]:
        yield "link", sum(links) / len(links)
    for name, times in (("attention_forward", 1.0), ("attention_backward", ATTENTION_BACKWARD)):
        # the rate of all shapes together, which the longest sequences weigh most in
        flops = {case: times * _attention_flops(case) for case in cases if name in cases[case]}
        if flops:
            seconds = sum(flops[case] / cases[case][name] for case in flops)
            yield name.removesuffix("_forward"), sum(flops.values()) / seconds
    timed = [
        (Product("library", (m,), (n,), k), record["count"], record["seconds"])
        for record in result.records
        if record["contestant"].startswith("float ")
        for m, n, k in [map(int, record["contestant"].split()[1].split("x"))]
    ]
    if timed:
        yield "library", rate_of(timed, "library", gpu)


def _attention_flops(case: str) -> float:
    shape = SHAPES[case]
    return 4.0 * shape.tokens**2 * shape.dim * shape.batch


def _sweep(result: Result, gpu: Gpu) -> Iterable[tuple[str, float]]:
    """Of each kind of our products, those with the fastest tile."""
    best: dict[tuple[str, str], Timed] = {}
    for record in result.records:
        if "reason" in record:
            continue
        sizes = tuple(record["rows"]), tuple(record["cols"]), record["k"]
        product = Product(record["kind"], *sizes)
        key = record["case"], record["contestant"]
        if key not in best or record["seconds"] < best[key][2]:
            best[key] = product, record["count"], record["seconds"]
    kinds: dict[str, list[Timed]] = {}
    for timed in best.values():
        kind = timed[0].kind.removesuffix("_persistent")
        # in 16 bits the order of the weight makes no difference
        kinds.setdefault(kind if kind in rates_of(gpu) else kind.removesuffix("_t"), []).append(
            timed
        )
    for kind, all_timed in kinds.items():
        if kind in rates_of(gpu):
            yield kind, rate_of(all_timed, kind, gpu)


def rate_of(timed: Sequence[Timed], name: str, gpu: Gpu) -> float:
    """The rate `name` at which the model gives the products' seconds, all together.

    Where it gives more at any rate, it is what was measured.
    """

    def at(rate: float) -> float:
        known = {name: {"value": rate, "source": "tried"}}
        tried = with_measured(gpu, known)
        return sum(product_seconds(product, 0, tried) * count for product, count, _ in timed)

    seconds = sum(count * each for _, count, each in timed)
    plain = sum(count * product.flops for product, count, _ in timed) / seconds
    return _solve(at, seconds, plain)


def _solve(seconds_at: Callable[[float], float], seconds: float, least: float) -> float:
    """The rate from `least` on at which `seconds_at` falls to `seconds`; else `least`."""
    low, high = least, 16 * least
    if not seconds_at(high) < seconds <= seconds_at(low):
        return least
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds_at(middle) > seconds else (low, middle)
    return high


def _in_codes(case: str, seconds: float) -> list[Timed]:
    """The products of IN_CODES, which take so many seconds all together: what each takes is
    unknown, and `rate_of` asks for their sum only.
    """
    found = products_of(SHAPES[case], "int8")
    each = seconds / sum(found.values())
    return [(Product("int8", p.rows, p.cols, p.size[2]), n, each) for p, n in found.items()]


def _profile(result: Result, gpu: Gpu) -> Iterable[tuple[str, float]]:
    """Between two launches: of the host, where a step waits for it; of the GPU, in a graph.

    Of products of codes as well, all of a checkpointed step together.
    """
    seconds: dict[str, float] = {}
    for record in result.records:
        if record["contestant"] == IN_CODES and record["mode"] in WIDE_KERNELS:
            seconds[record["case"]] = seconds.get(record["case"], 0.0) + record["seconds"]
    timed = [each for case, taken in seconds.items() for each in _in_codes(case, taken)]
    if timed:
        yield "int8", rate_of(timed, "int8", gpu)
    for record in result.records:
        if record["mode"] != "step" or not record["ours"] or not record["count"]:
            continue
        if "+graphs" in record["contestant"]:
            idle = max(record["seconds"] - record["busy_seconds"], 0.0)
            if idle:
                yield "gap", idle / record["count"]
        # a step whose modulation the host computes may wait for that
        elif (
            "+device-modulation" in record["contestant"]
            and record["busy_seconds"] < BUSY * record["seconds"]
        ):
            yield "launch", record["seconds"] / record["count"]
