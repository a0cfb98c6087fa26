"""A GPU by whatever name people give it, or this machine's, as an entry of the table."""

from __future__ import annotations

import difflib
import re

import torch

from fluxfast.memory.gpu_table import GPUS, Gpu
from fluxfast.ops.device import multiplies
from fluxfast_kernels.launch import arch_key

__all__ = ["GPUS", "Gpu", "find_gpu", "this_gpu"]

# how many near names an error gives, and how near they are
NEAR, NEARNESS = 3, 0.6


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in whatever spelling ("rtx3080", "4060 Ti 16GB").

    If a model comes with several sizes of memory and the name does not say which, the smallest is
    meant. Raises ValueError with the nearest names if there is none.
    """
    if same := _named(name):
        return min(same, key=lambda gpu: gpu.memory)
    told = "no name in it is like that one"
    if near := _near(name):
        *others, last = near
        told = f"did you mean {', '.join(others) + ' or ' * bool(others)}{last}?"
    raise ValueError(f"there is no GPU {name!r} in the table: {told}")


def this_gpu(device: torch.device) -> Gpu | None:
    """The GPU of this machine as an entry of the table; None for a CPU.

    Its memory and the products that its tensor cores have are its own. A GPU that the table does
    not have gets an RTX 3090's rates, which are only used to compare choices with one another, and
    is taken for a card with a screen.
    """
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    same = _named(properties.name)
    gpu = (
        min(same, key=lambda gpu: abs(gpu.memory - memory))
        if same
        else find_gpu("RTX 3090")._replace(name=properties.name)
    )
    return gpu._replace(
        arch=arch_key(device),
        multiprocessors=properties.multi_processor_count,
        memory=memory,
        bf16=gpu.bf16 if multiplies("same", device) else 0,
        int8=(gpu.int8 or gpu.bf16) if multiplies("int8", device) else 0,
        fp8=(gpu.fp8 or gpu.int8) if multiplies("e4m3", device) else 0,
    )


def _named(name: str) -> list[Gpu]:
    """The table's GPUs of a name: several where only their memory tells them apart."""
    model, memory = _model(name)
    return [gpu for gpu in GPUS if _model(gpu.name)[0] == model and memory in (None, gpu.memory)]


def _near(name: str) -> list[str]:
    """The names of the table that are most like a name, the nearest first.

    A model of the same number comes before one that is spelled alike.
    """
    first: dict[str, str] = {}
    for gpu in GPUS:
        first.setdefault(_spelled(gpu.name), gpu.name)
    asked = _spelled(name)
    number = re.search(r"\d{2,}", asked)
    same = [each for each in first if number and number[0] == re.sub(r"\D", "", each)]
    alike = difflib.get_close_matches(asked, first, NEAR, NEARNESS)
    return [first[each] for each in dict.fromkeys([*same, *alike])][:NEAR]


def _spelled(name: str) -> str:
    """A model with the family that a bare number leaves out, so that 2090 is not like H200."""
    model = _model(name)[0]
    return f"rtx{model}" if model[:1].isdigit() else model


def _model(name: str) -> tuple[str, float | None]:
    """What tells a model from others ("4060ti"), and the GiB that the name gives."""
    text = name.lower()
    memory = re.search(r"(\d+) ?gi?b?\b", text)
    if memory:
        text = text.replace(memory[0], " ")
    text = re.sub(
        r"nvidia|tesla|geforce|amd|radeon|instinct|generation|graphics|gpu|rtx|gtx|\brx|\bsxm\d*|"
        r"\bhbm\w*|\boam\b",
        " ",
        text.replace("mobile", "laptop"),
    )
    return re.sub(r"[^a-z0-9]", "", text), float(memory[1]) if memory else None
