"""Whether a device has the memory to train every weight of a transformer: known before a load.

A weight that trains takes its gradient and the optimiser's state beside it. For AdamW in bf16 that
is 10 bytes a parameter, 16 to 20 in fp32: 120 GB for FLUX.1's 12 billion, before any activation.
"""

from __future__ import annotations

from fluxfast.memory.plan import GIB, account
from fluxfast.memory.sizes import Workload
from fluxfast.model.apply import Choices

# the parts of a plan that the weights' number decides, in the order in which they are told
_BY_WEIGHTS = ("weights", "modulation", "gradients", "optimiser", "moving average")


def training_state(workload: Workload, choices: Choices) -> dict[str, int]:
    """Bytes on the device, by part, of the weights and of what training keeps for each of them."""
    plan = account(workload, choices).vram
    weights = plan["weights"] + plan["modulation"]
    found = {"weights": weights} | {name: plan[name] for name in _BY_WEIGHTS[2:]}
    return {name: size for name, size in found.items() if size}


def why_not_step(workload: Workload, choices: Choices, room: int, where: str) -> str | None:
    """The problem where a whole step exceeds the memory; arguments are those of `why_not`."""
    needed = account(workload, choices).needed
    if (problem := why_not(workload, choices, room, where)) is not None or needed <= room:
        return problem
    return (
        f'"model_type" is full: a step takes {needed / GIB:.1f} GiB, and {where} has '
        f'{room / GIB:.1f}: set a smaller "train_batch_size", or "gradient_checkpointing": true'
    )


def why_not(workload: Workload, choices: Choices, room: int, where: str) -> str | None:
    """The problem where the weights, and what training keeps for them, exceed the memory.

    room: bytes. where: whose memory it is, for the message. None where they fit, which says
    nothing of activations.
    """
    parts = training_state(workload, choices)
    if (needed := sum(parts.values())) <= room:
        return None
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    return (
        f'"model_type" is full: {workload.adapters / 1e9:.2f} billion parameters take '
        f"{needed / GIB:.1f} GiB before any activation ({told}), and {where} has "
        f'{room / GIB:.1f}: train a smaller transformer, or set "model_type": "lora"'
    )
