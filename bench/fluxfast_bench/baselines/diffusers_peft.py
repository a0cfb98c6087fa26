"""diffusers' transformer with PEFT's LoRA: eager, and with diffusers' own regional compilation."""

from typing import Any

from fluxfast_bench.contestants import Contestant


def compile_blocks(model: Any) -> None:
    """One compiled block of each kind serves all blocks of its kind."""
    model.compile_repeated_blocks()


CONTESTANTS = [
    Contestant("diffusers", "diffusers + PEFT, eager", cpu=True),
    Contestant("diffusers-compile", "diffusers + PEFT, regional compile", finish=compile_blocks, cpu=True),
]
