"""What a GPU sustains, as data: each rate measured, with its run, or assumed, with its reason.

Measured rates are in `rates.json` beside this file, by the GPU's name in `memory.gpus`.
`fluxfast-bench predict --from-results` writes them there from what a GPU has measured. All others
are assumed: a part of the GPU's peak, by its architecture. The parts for our own kernels' products
are `fluxfast_kernels.waves.SUSTAINED`, by which the kernels choose their tiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fluxfast.memory.gpus import Gpu, find_gpu
from fluxfast_kernels.waves import SUSTAINED

STORED = Path(__file__).with_name("rates.json")


class Rate(NamedTuple):
    """A rate, and where it is from: the run that measured it, or why it is assumed."""

    value: float
    measured: bool
    source: str


# every rate that a step's time is made of
NAMES = {
    "half": "16-bit products of our kernels, op/s",
    "library": "16-bit products of torch's GEMM, op/s",
    "int8": "int8 products of our kernels, op/s",
    "int8_t": "the same where the contraction of the weight is not contiguous",
    "e4m3": "e4m3 products of our kernels, op/s",
    "e4m3_t": "the same where the contraction of the weight is not contiguous",
    "fp32": "products of fp32 in our kernels, op/s",
    "attention": "attention's forward, op/s",
    "attention_backward": "attention's backward, op/s",
    "memory": "kernels that wait for memory, bytes/s",
    "link": "copies to or from pinned host memory, bytes/s one way",
    "launch": "a launch without a graph, seconds of the host",
    "gap": "from one kernel's end to the next one at full speed, seconds",
}


class Parts(NamedTuple):
    """The part that an architecture sustains of its peak: torch's GEMM and attention, of products
    in bf16; kernels that wait for memory, of its bandwidth.
    """

    library: float
    attention: float
    attention_backward: float
    memory: float
    source: str


_CUBLAS = "cuBLAS and flash attention as others have measured them"
PARTS: dict[str, Parts] = {
    "sm_80": Parts(0.82, 0.65, 0.55, 0.85, f"{_CUBLAS} on an A100"),
    "sm_86": Parts(0.92, 0.87, 0.69, 0.91, f"{_CUBLAS} on an RTX 3090"),
    "sm_89": Parts(0.91, 0.86, 0.68, 0.91, f"{_CUBLAS} on an RTX 4090"),
    "sm_90": Parts(0.74, 0.64, 0.52, 0.9, "cuBLAS and cuDNN as others have measured them"),
    "sm_120": Parts(0.84, 0.80, 0.63, 0.9, f"{_CUBLAS} on an RTX 5090"),
    "gfx942": Parts(0.46, 0.32, 0.21, 0.75, "hipBLASLt and AMD's attention on an MI300X"),
}
OTHERS = Parts(0.7, 0.5, 0.4, 0.8, "a guess for an architecture of which nothing is known")
# the chip that each row of SUSTAINED is about
CHIPS = {
    "sm_80": "A100 80GB",
    "sm_86": "RTX 3090",
    "sm_89": "RTX 4090",
    "sm_90": "H100",
    "sm_120": "RTX 5090",
    "gfx942": "MI300X",
}
# of a peak a multiprocessor that is twice its chip's, as workstation cards have it in 16 bits: they
# reach less of it, as the A100 and the H100 do
DOUBLED = 0.75
# of products in our kernels, where SUSTAINED has no row
OTHER_PRODUCTS = 0.5
# 8-bit products whose weight is read across: 370 of 490 TOP/s on an RTX 5090 (gau-nernst)
ACROSS = 0.76
LINK = Rate(0.8, False, "of the link's peak, as pinned copies commonly reach")
LAUNCH = Rate(
    32e-6, False, "`fluxfast-bench host`: 27 µs of Python by launch plans, and 5 for the driver"
)
GAP = Rate(2e-6, False, "what is commonly seen between the kernels of a CUDA graph")
# bytes a second of modulation's weights that a host's CPU multiplies with a vector
HOST_GEMV = Rate(40e9, False, "a desktop's two channels of DDR5, all cores reading")


def told(gpu: Gpu) -> str:
    """How many of a GPU's rates are measured, in a few words."""
    measured = [name for name, rate in rates_of(gpu).items() if rate.measured]
    if not measured:
        return "from assumed rates, none measured on such a GPU"
    assumed = len(rates_of(gpu)) - len(measured)
    return f"from measured rates ({', '.join(measured)}) and {assumed} assumed ones"


def modulation_on_host(nbytes: int) -> Rate:
    """Seconds that a host of which nothing is known takes for modulation with so many bytes of
    weights.
    """
    speed = f"{HOST_GEMV.value / 1e9:.0f} GB/s"
    return Rate(nbytes / HOST_GEMV.value, False, f"assumed at {speed}: {HOST_GEMV.source}")


@lru_cache(maxsize=256)
def rates_of(gpu: Gpu) -> Mapping[str, Rate]:
    """A GPU's rates by NAMES; products that its tensor cores lack are left out."""
    if gpu.measured is None:
        gpu = with_measured(gpu, read(STORED).get(gpu.name, {}))
    assert gpu.measured is not None
    return _assumed(gpu) | {name: Rate(value, True, run) for name, value, run in gpu.measured}


def with_measured(gpu: Gpu, found: Mapping[str, Mapping[str, Any]]) -> Gpu:
    """The GPU with these measured rates, as `read` has them, in the place of the package's."""
    rates = ((name, rate["value"], rate["source"]) for name, rate in sorted(found.items()))
    return gpu._replace(measured=tuple(rates))


def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Measured rates by GPU and name: {"value": …, "source": …}; none where there is no file.

    Raises ValueError for a file that holds something else.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for gpu, rates in found.items():
        unknown = [name for name in rates if name not in NAMES]
        if unknown or not all({"value", "source"} <= rate.keys() for rate in rates.values()):
            raise ValueError(
                f"{path}: expected a value and a source for each of {', '.join(NAMES)}; "
                f"{gpu} has {', '.join(unknown) or 'rates without them'}"
            )
    return found


def _assumed(gpu: Gpu) -> dict[str, Rate]:
    parts = PARTS.get(gpu.arch, OTHERS)
    wide = _doubled(gpu, "same")

    def part(share: float, peak: float, why: str) -> Rate:
        return Rate(share * peak, False, f"{share:.0%} of the peak: {why}")

    found = {
        "library": part(parts.library * wide, gpu.bf16 * 1e12, parts.source),
        "attention": part(parts.attention * wide, gpu.bf16 * 1e12, parts.source),
        "attention_backward": part(parts.attention_backward * wide, gpu.bf16 * 1e12, parts.source),
        "memory": part(parts.memory, gpu.bandwidth * 1e9, parts.source),
        "link": part(LINK.value, gpu.pcie * 1e9, LINK.source),
        "launch": LAUNCH,
        "gap": GAP,
    }
    for kind, compute in (("half", "same"), ("fp32", "same"), ("int8", "int8"), ("e4m3", "e4m3")):
        if gpu.rate(compute):
            share, why = _products(gpu, kind, compute)
            found[kind] = part(share, gpu.rate(compute) * 1e12, why)
            if compute != "same":
                across = f"{why}; {ACROSS:.0%} of that where the weight is read across"
                found[f"{kind}_t"] = part(share * ACROSS, gpu.rate(compute) * 1e12, across)
    return found


def _products(gpu: Gpu, kind: str, compute: str) -> tuple[float, str]:
    """The part of a peak that our kernels' products of a kind sustain, and why."""
    row = SUSTAINED.get(gpu.arch)
    if row is None or gpu.arch not in CHIPS or kind not in row.rates:
        return OTHER_PRODUCTS, OTHERS.source
    chip = find_gpu(CHIPS[gpu.arch])
    share = row.rates[kind] / (chip.rate(compute) * 1e12) * _doubled(gpu, compute)
    return share, f"as the kernels' tables have it of the {chip.name} ({row.source})"


def _doubled(gpu: Gpu, compute: str) -> float:
    """DOUBLED, or 1 where a multiprocessor's peak is about that of its architecture's chip."""
    if gpu.arch not in CHIPS:
        return 1.0
    chip = find_gpu(CHIPS[gpu.arch])
    own, its = (g.rate(compute) / g.multiprocessors for g in (gpu, chip))
    return DOUBLED if own > 1.5 * its else 1.0
