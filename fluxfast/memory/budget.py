"""How much of a GPU's memory a run may take, and on which GPUs there are runs at all."""

from __future__ import annotations

from fluxfast.memory.gpus import Gpu
from fluxfast.memory.plan import GIB
from fluxfast.memory.wishes import Wishes

# GiB of a GPU's memory that its driver keeps for itself
DRIVER = 0.25
# GiB that are left free where "vram_reserve" is not set: on a card for screens, whose programs take
# more and less as windows open and close, and on another
RESERVE_WITH_SCREEN, RESERVE = 1.0, 0.25


def reserve_gib(gpu: Gpu, asked: float | None = None) -> float:
    """GiB of a GPU that a run leaves free for the screen and other programs: `asked`, if given."""
    if asked is not None:
        return asked
    return RESERVE_WITH_SCREEN if gpu.screen else RESERVE


def usable_bytes(gpu: Gpu, reserve: float | None = None, free: int | None = None) -> int:
    """The VRAM that a run may take: what is free, less the reserve.

    reserve: as `reserve_gib` takes it. free: bytes; None: all of the GPU's but the driver's.
    """
    if free is None:
        free = round((gpu.memory - DRIVER) * GIB)
    return max(0, free - round(reserve_gib(gpu, reserve) * GIB))


def budget_bytes(wishes: Wishes, gpu: Gpu, free: int | None = None) -> int:
    """The VRAM that a run may take: vram_budget where it is a number, else `usable_bytes`."""
    if wishes.vram_budget not in (None, "auto"):
        return round(float(wishes.vram_budget) * GIB)
    return usable_bytes(gpu, wishes.vram_reserve, free)


def unsupported(gpu: Gpu | None) -> str | None:
    """Why no run trains on that GPU; None where runs do."""
    if gpu is None or gpu.bf16:
        return None
    return (
        f"{gpu.name} has no tensor cores for bf16, which fluxfast computes in: it needs an NVIDIA "
        "GPU of the RTX 30 series or newer (compute capability 8.0)"
    )
