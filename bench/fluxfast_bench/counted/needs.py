"""How much GPU memory a contestant will take, before it is built.

This decides whether it fits beside those that are there. Ours takes what `fluxfast-train plan`
says. The activations of diffusers with PEFT's LoRA were counted on meta tensors, byte by byte (a
test counts them again); its blocks keep the same whether a linear's weight is quantised or not.
"""

from __future__ import annotations

from fluxfast.adapters.presets import preset_targets
from fluxfast.config.optimizers import OPTIMIZERS
from fluxfast.memory import plan
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast_bench.step.contestants import TARGETS, Contestant, Setup

# [tokens, dim] tensors that a peer keeps for backward, a double and a single block
PEER_KEEPS = {"none": (18.1, 17.1), "full": (1.0, 1.0)}
# and that it works with at most: a block whose forward is run again keeps everything for a while
PEER_WORKS = {"none": 10.3, "full": 28.4}


def bytes_needed(contestant: Contestant, setup: Setup) -> int:
    """The peak of a step on the largest shape, with weights, adapters and optimiser states."""
    workloads = [_workload(contestant, setup, index) for index in range(len(setup.shapes))]
    return max(
        _ours(contestant, setup, w) if contestant.ours else _peer(contestant, setup, w)
        for w in workloads
    )


def _workload(contestant: Contestant, setup: Setup, index: int) -> Workload:
    shape = setup.shapes[index]
    sizes = FluxSizes.from_config(shape.config)
    format = contestant.storage if contestant.ours and contestant.storage != "bf16" else None
    return Workload(
        sizes=sizes,
        tokens=(shape.tokens,) * sizes.blocks,
        text_tokens=shape.txt,
        batch=shape.batch,
        storage=Storage(format),
        targets=preset_targets(TARGETS),
        rank=setup.rank,
        optimizer=setup.optimizer,
        compute="same" if contestant.compute == "float" else contestant.compute,
    )


def _ours(contestant: Contestant, setup: Setup, workload: Workload) -> int:
    choices = plan.Choices(
        (setup.recompute,) * workload.sizes.blocks,
        slots=2 if contestant.streamed else 0,
        modulation_ahead=setup.looks_ahead and contestant.looks_ahead,
        host_inputs=contestant.streamed,
        # of GPUs whose dgrad reads them, where the contestant is one that has them
        transposed_codes=contestant.transposes and not contestant.streamed,
    )
    return plan.account(workload, choices).peak


def _peer(contestant: Contestant, setup: Setup, workload: Workload) -> int:
    sizes = workload.sizes
    weights = (
        sum(linear.in_features * linear.out_features for linear in sizes.linears())
        * contestant.bytes_per_weight
    )
    double, single = PEER_KEEPS[setup.recompute]
    tensors = (
        sizes.num_layers * double + sizes.num_single_layers * single + PEER_WORKS[setup.recompute]
    )
    activations = tensors * workload.tokens[0] * workload.batch * sizes.dim * setup.dtype.itemsize
    # a gradient beside each parameter
    adapters = workload.adapters * (
        2 * workload.adapter_itemsize + OPTIMIZERS[setup.optimizer].state_bytes(2)
    )
    return round(weights + activations + adapters) + plan.GEMM_WORKSPACE
