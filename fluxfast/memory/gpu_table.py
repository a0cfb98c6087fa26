"""Common GPUs as data: memory, bandwidths and peak rates, each with its public source.

Rates are the makers' peaks for dense products, with fp32 sums where the makers tell those apart.
Figures were entered by hand. Those of the whitepapers' tables and of the RTX 40 laptops were looked
up; of other cards that are taken from specifications, not every one was compared again.
"""

from __future__ import annotations

from typing import NamedTuple

AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, v2.1, tables 2, 9 and 10"
ADA = "NVIDIA Ada GPU Architecture whitepaper, v2.1, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, v1.1, appendix A"
# for GeForce cards that the whitepapers leave out
SPECS = (
    "NVIDIA's specifications, not all compared again: cores, boost clock and memory, at the "
    "architecture's rates per core"
)
LAPTOPS = (
    "NVIDIA's specifications of laptop GPUs, not all compared again: cores, the highest boost "
    "clock and memory, at the architecture's rates per core; a laptop with a lower power limit is "
    "slower"
)


class Gpu(NamedTuple):
    """A GPU's memory and peak rates; `memory.rates` has what it sustains of them.

    arch: its key in the kernels' launch tables. multiprocessors: how many it has (AMD: compute
    units).
    memory: GiB.
    bandwidth, pcie: GB/s of its memory, and of its link to the host one way.
    bf16, int8, fp8: tera-operations a second of products; 0 where our kernels have no products of
    the type on its tensor cores.
    source: where the figures are from.
    measured: (rate, its value, the run that measured it) of `memory.rates.NAMES`; None: those that
    the package has.
    screen: whether it is a card that people connect their screen to.

    Products of codes in "e4m3" run at the fp8 rate.
    """

    name: str
    arch: str
    multiprocessors: int
    memory: float
    bandwidth: float
    bf16: float
    int8: float
    fp8: float
    pcie: float
    source: str
    measured: tuple[tuple[str, float, str], ...] | None = None
    screen: bool = False

    def rate(self, compute: str) -> float:
        """Of products in "same" (bf16), "int8" or "e4m3"; 0: its tensor cores don't have them."""
        return {"same": self.bf16, "int8": self.int8, "e4m3": self.fp8}[compute]


# GB/s of 16 lanes, one way; cards with 8 lanes have half of it
PCIE3, PCIE4, PCIE5 = 15.75, 31.5, 63.0
# operations a clock of one GeForce core's share of the tensor cores: bf16 with fp32 sums, int8, and
# fp8 with fp32 sums. Those of the whitepapers' cards: 165.2, 660.6 and 330.3 of an RTX 4090, which
# has 16384 cores at 2.52 GHz. Triton compiles no products for Turing's tensor cores.
PER_CORE = {"sm_75": (0, 0, 0), "sm_86": (4, 16, 0), "sm_89": (4, 16, 8), "sm_120": (4, 16, 8)}
CORES_OF_A_MULTIPROCESSOR = {"sm_75": 64, "sm_86": 128, "sm_89": 128, "sm_120": 128}


def _geforce(
    name: str,
    arch: str,
    cores: int,
    clock: float,
    memory: float,
    bandwidth: float,
    pcie: float,
    source: str = SPECS,
) -> Gpu:
    """A GeForce card from NVIDIA's own figures: cores, boost clock in GHz, GiB and GB/s."""
    bf16, int8, fp8 = (round(each * cores * clock / 1000, 1) for each in PER_CORE[arch])
    multiprocessors = cores // CORES_OF_A_MULTIPROCESSOR[arch]
    rates = (float(bandwidth), bf16, int8, fp8, pcie)
    return Gpu(name, arch, multiprocessors, memory, *rates, source, screen=True)


GPUS = (
    _geforce("RTX 2060", "sm_75", 1920, 1.68, 6, 336, PCIE3),
    _geforce("RTX 2060 12GB", "sm_75", 2176, 1.65, 12, 336, PCIE3),
    _geforce("RTX 2060 SUPER", "sm_75", 2176, 1.65, 8, 448, PCIE3),
    _geforce("RTX 2070", "sm_75", 2304, 1.62, 8, 448, PCIE3),
    _geforce("RTX 2070 SUPER", "sm_75", 2560, 1.77, 8, 448, PCIE3),
    _geforce("RTX 2080", "sm_75", 2944, 1.71, 8, 448, PCIE3),
    _geforce("RTX 2080 SUPER", "sm_75", 3072, 1.815, 8, 496, PCIE3),
    _geforce("RTX 2080 Ti", "sm_75", 4352, 1.545, 11, 616, PCIE3),
    _geforce("RTX 3050", "sm_86", 2560, 1.777, 8, 224, PCIE4 / 2),
    _geforce("RTX 3060", "sm_86", 3584, 1.777, 12, 360, PCIE4),
    _geforce("RTX 3060 Ti", "sm_86", 4864, 1.665, 8, 448, PCIE4),
    Gpu("RTX 3070", "sm_86", 46, 8, 448, 40.6, 162.6, 0, PCIE4, AMPERE, screen=True),
    _geforce("RTX 3070 Ti", "sm_86", 6144, 1.77, 8, 608, PCIE4),
    Gpu("RTX 3080", "sm_86", 68, 10, 760, 59.5, 238, 0, PCIE4, AMPERE, screen=True),
    _geforce("RTX 3080 12GB", "sm_86", 8960, 1.71, 12, 912, PCIE4),
    _geforce("RTX 3080 Ti", "sm_86", 10240, 1.665, 12, 912, PCIE4),
    Gpu("RTX 3090", "sm_86", 82, 24, 936, 71, 284, 0, PCIE4, AMPERE, screen=True),
    _geforce("RTX 3090 Ti", "sm_86", 10752, 1.86, 24, 1008, PCIE4),
    _geforce("RTX 4060", "sm_89", 3072, 2.46, 8, 272, PCIE4 / 2),
    _geforce("RTX 4060 Ti 8GB", "sm_89", 4352, 2.535, 8, 288, PCIE4 / 2),
    _geforce("RTX 4060 Ti 16GB", "sm_89", 4352, 2.535, 16, 288, PCIE4 / 2),
    _geforce("RTX 4070", "sm_89", 5888, 2.475, 12, 504, PCIE4),
    _geforce("RTX 4070 SUPER", "sm_89", 7168, 2.475, 12, 504, PCIE4),
    Gpu("RTX 4070 Ti", "sm_89", 60, 12, 504, 80.2, 320.7, 160.4, PCIE4, ADA, screen=True),
    _geforce("RTX 4070 Ti SUPER", "sm_89", 8448, 2.61, 16, 672, PCIE4),
    Gpu("RTX 4080", "sm_89", 76, 16, 716.8, 97.5, 389.9, 194.9, PCIE4, ADA, screen=True),
    _geforce("RTX 4080 SUPER", "sm_89", 10240, 2.55, 16, 736, PCIE4),
    Gpu("RTX 4090", "sm_89", 128, 24, 1008, 165.2, 660.6, 330.3, PCIE4, ADA, screen=True),
    _geforce("RTX 5050", "sm_120", 2560, 2.572, 8, 320, PCIE5 / 2),
    _geforce("RTX 5060", "sm_120", 3840, 2.497, 8, 448, PCIE5 / 2),
    _geforce("RTX 5060 Ti 8GB", "sm_120", 4608, 2.572, 8, 448, PCIE5 / 2),
    _geforce("RTX 5060 Ti 16GB", "sm_120", 4608, 2.572, 16, 448, PCIE5 / 2),
    Gpu("RTX 5070", "sm_120", 48, 12, 672, 61.7, 246.9, 123.5, PCIE5, BLACKWELL, screen=True),
    Gpu("RTX 5070 Ti", "sm_120", 70, 16, 896, 87.9, 351.5, 175.8, PCIE5, BLACKWELL, screen=True),
    Gpu("RTX 5080", "sm_120", 84, 16, 960, 112.6, 450.2, 225.1, PCIE5, BLACKWELL, screen=True),
    Gpu("RTX 5090", "sm_120", 170, 32, 1792, 209.5, 838, 419, PCIE5, BLACKWELL, screen=True),
    # makers of laptops commonly connect 8 lanes
    _geforce("RTX 3060 Laptop", "sm_86", 3840, 1.703, 6, 336, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 3070 Laptop", "sm_86", 5120, 1.62, 8, 448, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 3070 Ti Laptop", "sm_86", 5888, 1.485, 8, 448, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 3080 Laptop 8GB", "sm_86", 6144, 1.71, 8, 448, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 3080 Laptop 16GB", "sm_86", 6144, 1.71, 16, 448, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 3080 Ti Laptop", "sm_86", 7424, 1.59, 16, 512, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 4050 Laptop", "sm_89", 2560, 2.37, 6, 192, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 4060 Laptop", "sm_89", 3072, 2.37, 8, 256, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 4070 Laptop", "sm_89", 4608, 2.175, 8, 256, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 4080 Laptop", "sm_89", 7424, 2.28, 12, 432, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 4090 Laptop", "sm_89", 9728, 2.04, 16, 576, PCIE4 / 2, LAPTOPS),
    _geforce("RTX 5060 Laptop", "sm_120", 3328, 2.497, 8, 384, PCIE5 / 2, LAPTOPS),
    _geforce("RTX 5070 Laptop", "sm_120", 4608, 2.347, 8, 384, PCIE5 / 2, LAPTOPS),
    _geforce("RTX 5070 Ti Laptop", "sm_120", 5888, 2.22, 12, 672, PCIE5 / 2, LAPTOPS),
    _geforce("RTX 5080 Laptop", "sm_120", 7680, 2.287, 16, 896, PCIE5 / 2, LAPTOPS),
    _geforce("RTX 5090 Laptop", "sm_120", 10496, 2.16, 24, 896, PCIE5 / 2, LAPTOPS),
    # 65 tera-operations a second of fp16, and 130 of int8, on tensor cores that have no bf16
    Gpu("T4", "sm_75", 40, 16, 320, 0, 0, 0, PCIE3, "NVIDIA T4 datasheet"),
    Gpu("RTX A6000", "sm_86", 84, 48, 768, 154.8, 309.7, 0, PCIE4, AMPERE, screen=True),
    Gpu(
        "RTX 6000 Ada",
        "sm_89",
        142,
        48,
        960,
        364.2,
        728.5,
        728.5,
        PCIE4,
        "NVIDIA RTX 6000 Ada Generation datasheet; sparse rates halved",
        screen=True,
    ),
    Gpu("A10", "sm_86", 72, 24, 600, 125, 250, 0, PCIE4, "NVIDIA A10 datasheet"),
    Gpu(
        "L4",
        "sm_89",
        58,
        24,
        300,
        121,
        242.5,
        242.5,
        PCIE4,
        "NVIDIA L4 datasheet; sparse rates halved",
    ),
    Gpu("L40S", "sm_89", 142, 48, 864, 362, 733, 733, PCIE4, "NVIDIA L40S datasheet"),
    Gpu("A100 40GB", "sm_80", 108, 40, 1555, 312, 624, 0, PCIE4, "NVIDIA A100 datasheet"),
    Gpu("A100 80GB", "sm_80", 108, 80, 2039, 312, 624, 0, PCIE4, "NVIDIA A100 datasheet (SXM)"),
    Gpu(
        "H100 PCIe",
        "sm_90",
        114,
        80,
        2000,
        756,
        1513,
        1513,
        PCIE5,
        "NVIDIA H100 datasheet; sparse rates halved",
    ),
    Gpu(
        "H100",
        "sm_90",
        132,
        80,
        3350,
        989.5,
        1979,
        1979,
        PCIE5,
        "NVIDIA H100 datasheet (SXM); sparse rates halved",
    ),
    Gpu(
        "H200",
        "sm_90",
        132,
        141,
        4800,
        989.5,
        1979,
        1979,
        PCIE5,
        "NVIDIA H200 datasheet (SXM); sparse rates halved",
    ),
    Gpu(
        "B200",
        "sm_100",
        148,
        180,
        7700,
        2250,
        4500,
        4500,
        PCIE5,
        "NVIDIA HGX B200 datasheet, an eighth of it; sparse rates halved",
    ),
    Gpu(
        "MI250X",
        "gfx90a",
        208,
        128,
        3277,
        383,
        383,
        0,
        PCIE4,
        "AMD Instinct MI250X data sheet (both dies)",
    ),
    Gpu(
        "MI300X",
        "gfx942",
        304,
        192,
        5300,
        1307.4,
        2614.9,
        2614.9,
        PCIE5,
        "AMD Instinct MI300X data sheet",
    ),
    Gpu(
        "RX 7900 XTX",
        "gfx1100",
        96,
        24,
        960,
        122.8,
        122.8,
        0,
        PCIE4,
        "amd.com's specifications; WMMA's int8 rate is that of bf16",
        screen=True,
    ),
)
