"""What each value of `attention_mechanism` runs: one row of a table for each of SimpleTuner's.

Training takes a back end of `fluxfast.ops.attention`, which is a kernel of PyTorch's or our own.
SageAttention is the one package that is called itself, and only where images are drawn, since it
has no backward.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Mechanism(NamedTuple):
    """What a value runs.

    Attributes:
        gpu, cpu: the back end of training on a GPU and on a CPU; None: there is none.
        drawing: the back end while validation images are drawn, where that is another one.
        generation: the least of NVIDIA's compute capabilities, such as 89 for 8.9; 0: AMD's GPUs
            have it too.
        half: whether it takes 16-bit values alone.
        masks: whether it takes a mask.
        note: what a run says of it.
        refused: why nothing runs it; "" where it runs.
    """

    gpu: str | None = None
    cpu: str | None = None
    drawing: str | None = None
    generation: int = 0
    half: bool = False
    masks: bool = True
    note: str = ""
    refused: str = ""

    @property
    def draws_apart(self) -> bool:
        """Whether it is for validation images alone."""
        return self.drawing is not None


def _flash(note: str = "") -> Mechanism:
    return Mechanism("flash", "cpu", half=True, masks=False, note=note)


def _sage(drawing: str, generation: int) -> Mechanism:
    # sums of training are those of "diffusers"
    return Mechanism("auto", "auto", drawing, generation, half=True)


_VERSION_2 = "PyTorch has FlashAttention-2 built in, and that is what runs; no package is needed"
_VERSION_3 = (
    "its forward and backward apart, which fused blocks need, are no public interface of the "
    'package; "cudnn" has kernels for the same GPUs'
)
_METAL = "it runs on Apple's GPUs, which fluxfast does not support"

MECHANISMS: dict[str, Mechanism] = {
    "diffusers": Mechanism("auto", "auto"),
    "xformers": Mechanism(
        "efficient",
        note="PyTorch has xFormers' memory-efficient attention built in, and that is what runs; no "
        "package is needed",
    ),
    "flash-attn": _flash(_VERSION_2),
    "flash-attn-2": _flash(_VERSION_2),
    "flash-attn-3": Mechanism(refused=_VERSION_3),
    "flash-attn-3-varlen": Mechanism(refused=_VERSION_3),
    "flex": Mechanism(
        refused="FLUX.1 attends to every token, and FlexAttention is for what leaves some out"
    ),
    "cudnn": Mechanism("cudnn", generation=80, half=True),
    "native-efficient": Mechanism("efficient"),
    "native-flash": _flash(),
    "native-math": Mechanism("ref", "ref"),
    "sla": Mechanism(
        refused="sparse linear attention changes what the model computes: only a model that was "
        "trained with it draws with it"
    ),
    "sageattention": _sage("sageattention", 80),
    "sageattention-int8-fp16-triton": _sage("sageattention-int8-fp16-triton", 80),
    "sageattention-int8-fp16-cuda": _sage("sageattention-int8-fp16-cuda", 80),
    "sageattention-int8-fp8-cuda": _sage("sageattention-int8-fp8-cuda", 89),
}


def runnable() -> Iterator[str]:
    """The values that something runs."""
    return (name for name, mechanism in MECHANISMS.items() if not mechanism.refused)


def why_refused(name: str) -> str | None:
    """Why nothing runs a value; None where something does, or where nobody knows the value."""
    if name.startswith("metal-"):
        return _METAL
    return MECHANISMS[name].refused or None if name in MECHANISMS else None


def obstacle(name: str, arch: str | None) -> str | None:
    """Why a GPU does not have a mechanism that runs; None where it has.

    arch: the GPU's key in the kernels' launch tables, such as "sm_90" or "gfx942"; None: a CPU.
    """
    mechanism = MECHANISMS[name]
    if arch is None:
        if mechanism.draws_apart or mechanism.cpu is None:
            return "it runs on a GPU, and there is none"
        return None
    if not mechanism.generation:
        return None
    if not arch.startswith("sm_"):
        return f"it runs on NVIDIA's GPUs, and this one is {arch}"
    if int(arch.removeprefix("sm_")) < mechanism.generation:
        least = f"{mechanism.generation / 10:.1f}"
        return f"it needs compute capability {least} or later, and this GPU is {arch}"
    return None
