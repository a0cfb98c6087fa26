"""diffusers' transformer with PEFT's LoRA: eager, and with diffusers' own regional compilation."""

from typing import Any

from fluxfast_bench.step.contestants import Contestant, Setup, checkpointing


def compiled(model: Any, setup: Setup) -> None:
    """One compiled block of each kind serves all blocks of its kind, anew for each shape.

    torch.compile's own choice, sizes that may change from the second shape on, would make the
    second shape's kernels slower.
    """
    checkpointing(model, setup)
    model.compile_repeated_blocks(dynamic=False)


CONTESTANTS = [
    Contestant("diffusers", "diffusers + PEFT, eager", cpu=True),
    Contestant(
        "diffusers-compile", "diffusers + PEFT, regional compile", get_ready=compiled, cpu=True
    ),
]
