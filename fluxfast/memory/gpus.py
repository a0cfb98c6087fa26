"""Common GPUs as data, so that choices and predictions can be made for one that is not there.

Rates are the makers' peaks for dense products, with fp32 sums where the makers tell those apart.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from fluxfast.ops.device import multiplies
from fluxfast_kernels.launch import arch_key

AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, v2.1, tables 2, 9 and 10"
ADA = "NVIDIA Ada GPU Architecture whitepaper, v2.1, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, v1.1, appendix A"
# for GeForce cards that the whitepapers leave out
SPECS = (
    "nvidia.com's specifications: cores, boost clock and memory, at the architecture's rates "
    "per core"
)


class Gpu(NamedTuple):
    """A GPU's memory and peak rates; `memory.rates` has what it sustains of them.

    arch: its key in the kernels' launch tables. multiprocessors: how many it has (AMD: compute
    units).
    memory: GiB.
    bandwidth, pcie: GB/s of its memory, and of its link to the host one way.
    bf16, int8, fp8: tera-operations a second of products; 0 if its tensor cores lack the type.
    source: where the figures are from.
    measured: (rate, its value, the run that measured it) of `memory.rates.NAMES`; None: those that
    the package has.

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

    def rate(self, compute: str) -> float:
        """Of products in "same" (bf16), "int8" or "e4m3"; 0: its tensor cores don't have them."""
        return {"same": self.bf16, "int8": self.int8, "e4m3": self.fp8}[compute]


# GB/s of 16 lanes, one way; cards with 8 lanes have half of it
PCIE4, PCIE5 = 31.5, 63.0

GPUS = (
    Gpu("RTX 3060", "sm_86", 28, 12, 360, 25.5, 102, 0, PCIE4, SPECS),
    Gpu("RTX 3060 Ti", "sm_86", 38, 8, 448, 32.4, 130, 0, PCIE4, SPECS),
    Gpu("RTX 3070", "sm_86", 46, 8, 448, 40.6, 162.6, 0, PCIE4, AMPERE),
    Gpu("RTX 3080", "sm_86", 68, 10, 760, 59.5, 238, 0, PCIE4, AMPERE),
    Gpu("RTX 3080 12GB", "sm_86", 70, 12, 912, 61.3, 245, 0, PCIE4, SPECS),
    Gpu("RTX 3080 Ti", "sm_86", 80, 12, 912, 68.2, 273, 0, PCIE4, SPECS),
    Gpu("RTX 3090", "sm_86", 82, 24, 936, 71, 284, 0, PCIE4, AMPERE),
    Gpu("RTX 3090 Ti", "sm_86", 84, 24, 1008, 80, 320, 0, PCIE4, SPECS),
    Gpu("RTX 4060", "sm_89", 24, 8, 272, 30.2, 121, 60.5, PCIE4 / 2, SPECS),
    Gpu("RTX 4060 Ti 8GB", "sm_89", 34, 8, 288, 44.1, 176.5, 88.3, PCIE4 / 2, SPECS),
    Gpu("RTX 4060 Ti 16GB", "sm_89", 34, 16, 288, 44.1, 176.5, 88.3, PCIE4 / 2, SPECS),
    Gpu("RTX 4070", "sm_89", 46, 12, 504, 58.3, 233.2, 116.6, PCIE4, SPECS),
    Gpu("RTX 4070 Ti", "sm_89", 60, 12, 504, 80.2, 320.7, 160.4, PCIE4, ADA),
    Gpu("RTX 4070 Ti SUPER", "sm_89", 66, 16, 672, 88.2, 352.9, 176.4, PCIE4, SPECS),
    Gpu("RTX 4080", "sm_89", 76, 16, 716.8, 97.5, 389.9, 194.9, PCIE4, ADA),
    Gpu("RTX 4090", "sm_89", 128, 24, 1008, 165.2, 660.6, 330.3, PCIE4, ADA),
    Gpu("RTX 5060 Ti 16GB", "sm_120", 36, 16, 448, 47.4, 189.6, 94.8, PCIE5 / 2, SPECS),
    Gpu("RTX 5070", "sm_120", 48, 12, 672, 61.7, 246.9, 123.5, PCIE5, BLACKWELL),
    Gpu("RTX 5070 Ti", "sm_120", 70, 16, 896, 87.9, 351.5, 175.8, PCIE5, BLACKWELL),
    Gpu("RTX 5080", "sm_120", 84, 16, 960, 112.6, 450.2, 225.1, PCIE5, BLACKWELL),
    Gpu("RTX 5090", "sm_120", 170, 32, 1792, 209.5, 838, 419, PCIE5, BLACKWELL),
    Gpu("RTX A6000", "sm_86", 84, 48, 768, 154.8, 309.7, 0, PCIE4, AMPERE),
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
    ),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in whatever spelling ("rtx3080", "4060 Ti 16GB").

    If a model comes with several sizes of memory and the name does not say which, the smallest is
    meant. Raises ValueError with names that are close if there is none.
    """
    model, memory = _model(name)
    same = [gpu for gpu in GPUS if _model(gpu.name)[0] == model and memory in (None, gpu.memory)]
    if same:
        return min(same, key=lambda gpu: gpu.memory)
    digits = "".join(filter(str.isdigit, model))
    near = [gpu.name for gpu in GPUS if digits and digits in gpu.name]
    raise ValueError(
        f"there is no GPU {name!r} in the table; there are "
        f"{', '.join(near or [gpu.name for gpu in GPUS])}"
    )


def this_gpu(device: torch.device) -> Gpu | None:
    """The GPU of this machine as an entry of the table; None for a CPU.

    Its memory and the products that its tensor cores have are its own. A GPU that the table does
    not have gets an RTX 3090's rates, which are only used to compare choices with one another.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    try:
        gpu = find_gpu(properties.name)
    except ValueError:
        gpu = find_gpu("RTX 3090")._replace(name=properties.name)
    return gpu._replace(
        arch=arch_key(device),
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory / 2**30,
        int8=(gpu.int8 or gpu.bf16) if multiplies("int8", device) else 0,
        fp8=(gpu.fp8 or gpu.int8) if multiplies("e4m3", device) else 0,
    )


def _model(name: str) -> tuple[str, float | None]:
    """What tells a model from others ("4060ti"), and the GiB that the name gives."""
    text = name.lower()
    memory = re.search(r"(\d+) ?gi?b\b", text)
    if memory:
        text = text.replace(memory[0], " ")
    text = re.sub(
        r"nvidia|geforce|amd|radeon|instinct|generation|graphics|gpu|\brtx|\brx|\bsxm\d*|\bhbm\w*|\boam\b",
        " ",
        text,
    )
    return re.sub(r"[^a-z0-9]", "", text), float(memory[1]) if memory else None
