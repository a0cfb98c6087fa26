"""`fluxfast-bench ceilings`: what the device reaches at FLUX.1's shapes with PyTorch's own kernels.

    copy                 bytes read and written a second, of a copy far larger than any cache
    link                 bytes copied a second from pinned host memory to a GPU
    float, int8, e4m3    FLOPs a second of matrix products, over all that a step has
    attention_forward    FLOPs a second of scaled_dot_product_attention,
    attention_backward       by its fastest back end

The data is random, because products of zeros run faster. A format that the device has no product
for is left out. `step` and `ops` need these figures for floors and ceilings: they measure them, or
take them from a stored run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxfast.doctor.rates import (
    Product,
    attention_seconds,
    copy_rate,
    e4m3_product,
    float_product,
    int8_product,
    link_rate,
)
from fluxfast_bench.counted.floor import ATTENTION_BACKWARD
from fluxfast_bench.options import add_case_options, chosen, chosen_device, wide_console
from fluxfast_bench.progress import in_turn
from fluxfast_bench.report import results
from fluxfast_bench.run import Run
from fluxfast_bench.shapes import SHAPES, Shape, default_shapes
from fluxfast_bench.timing import best_time

logger = logging.getLogger("fluxfast")
# hears of each record as it is measured
Told = Callable[[dict[str, Any]], object]
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def products(shape: Shape, *, codes: bool = False) -> dict[tuple[int, int, int], int]:
    """(M, N, K) of a checkpointed step's wide products, linears packed, and how often each comes.

    codes: of 8 bit, which take the gradient of a single block's first linears in two. (A test holds
    this to what a step asks for; the first block's input wants no gradient, which is not told
    apart.)
    """
    d, double, single = shape.dim, shape.config["num_layers"], shape.config["num_single_layers"]
    found: dict[tuple[int, int, int], int] = {}

    def add(m: int, n: int, k: int, count: int) -> None:
        found[m, n, k] = found.get((m, n, k), 0) + count

    rows = shape.tokens * shape.batch
    add(rows, 7 * d, d, 2 * single)
    add(rows, d, 5 * d, single)
    add(rows, 5 * d, d, single)
    for width in (3 * d, 4 * d) if codes else (7 * d,):
        add(rows, d, width, single)
    for tokens in (shape.img, shape.txt):
        rows = tokens * shape.batch
        for n, k, count in ((3 * d, d, 2), (d, d, 3), (4 * d, d, 3), (d, 4 * d, 2), (d, 3 * d, 1)):
            add(rows, n, k, count * double)
    return found


def _ignored(record: dict[str, Any]) -> None:
    return None


def measure(
    shape: Shape, device: torch.device, told: Told = _ignored, seconds: float = 0.2
) -> dict[str, float]:
    """All ceilings of a shape, taking about `seconds` for each figure.

    Activations are in bf16 on a GPU and in fp32 on a CPU.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    nbytes = (1 << 28) if device.type == "cpu" else (1 << 31)
    timer = partial(best_time, seconds=seconds)
    found = {"copy": copy_rate(device, nbytes=nbytes, seconds=timer).per_second}
    told({"case": shape.name, "contestant": "copy", "gb_s": found["copy"] / 1e9})
    kinds: list[tuple[str, Product]] = [("float", float_product)]
    if device.type == "cuda":
        kinds += [("int8", int8_product), ("e4m3", e4m3_product)]
    for name, product in kinds:
        try:
            found[name] = _rate(shape, device, name, product, dtype, told, seconds)
        except RuntimeError as error:
            logger.warning("no %s product on this device: %s", name, str(error).splitlines()[0])
    if device.type == "cuda":
        found["link"] = link_rate(device, to_device=True).per_second
        told({"case": shape.name, "contestant": "link", "gb_s": found["link"] / 1e9})
    return found | _attention(shape, device, dtype, told, seconds)


def _rate(
    shape: Shape,
    device: torch.device,
    kind: str,
    product: Product,
    dtype: torch.dtype,
    told: Told,
    seconds: float,
) -> float:
    flops = taken = 0.0
    for (m, n, k), count in products(shape, codes=kind != "float").items():
        x, w = (torch.randn(size, k, device=device).to(dtype) for size in (m, n))
        each = best_time(product(x, w), device, seconds)
        flops += count * 2.0 * m * n * k
        taken += count * each
        record = {"case": shape.name, "contestant": f"{kind} {m}x{n}x{k}", "count": count}
        told({**record, "seconds": each, "tflops": 2e-12 * m * n * k / each})
    return flops / taken


def _attention(
    shape: Shape, device: torch.device, dtype: torch.dtype, told: Told, seconds: float
) -> dict[str, float]:
    size = (shape.batch, shape.heads, shape.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, device=device).to(dtype).requires_grad_() for _ in range(3))
    flops = 4.0 * shape.tokens**2 * shape.dim * shape.batch
    best = {"attention_forward": 0.0, "attention_backward": 0.0}
    for backend, (forward, backward) in _attention_times(q, k, v, device, seconds):
        rates = {
            "attention_forward": flops / forward,
            "attention_backward": ATTENTION_BACKWARD * flops / backward,
        }
        for (name, rate), each in zip(rates.items(), (forward, backward), strict=True):
            told(
                {
                    "case": shape.name,
                    "contestant": f"{name} {backend}",
                    "seconds": each,
                    "tflops": rate / 1e12,
                }
            )
            best[name] = max(best[name], rate)
    return best


def _attention_times(
    q: Tensor, k: Tensor, v: Tensor, device: torch.device, seconds: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Of each back end that there is: seconds of a forward and of a backward."""
    timer = partial(best_time, seconds=seconds)
    for name, backend in {"default": None}.items() if device.type == "cpu" else BACKENDS.items():
        try:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                times = attention_seconds(q, k, v, seconds=timer)
        except RuntimeError as error:
            logger.warning("attention: no back end '%s' here: %s", name, str(error).splitlines()[0])
            continue
        yield name, times


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("case", "what", "µs", "TFLOP/s or GB/s")
    for r in records:
        rate = f"{r['tflops']:.2f}" if "tflops" in r else f"{r['gb_s']:.0f} GB/s"
        table.add_row(
            r["case"], r["contestant"], f"{r['seconds'] * 1e6:.1f}" if "seconds" in r else "", rate
        )
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fluxfast-bench ceilings", description=__doc__.split("\n\n")[0].partition(": ")[2]
    )
    add_case_options(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.2,
        help="that each figure takes, about (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, default=results.ROOT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = chosen_device(options.device)
        shapes = chosen("--shapes", options.shapes, list(SHAPES), default_shapes(device))
    except ValueError as error:
        print(f"fluxfast-bench ceilings: {error}", file=sys.stderr)
        return 1
    run = Run(options.results, device, ["ceilings", *argv])
    journal = run.journal
    for shape in in_turn(shapes):
        rates = measure(
            SHAPES[shape],
            device,
            lambda record: journal.record({**record, "ours": False}),
            options.seconds,
        )
        journal.note(ceilings={shape: rates})
    console = wide_console()
    console.print(table_of(journal.records()))
    run.finish(console)
    return 0
