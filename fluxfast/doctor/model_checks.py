"""A shallow FLUX.1, one block of each kind, as a run has it.

It is compared with diffusers and PEFT in fp32, replayed as CUDA graphs, and streamed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from fluxfast.adapters.lora import add_lora
from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.doctor.checks import Check, Finding, Part, Random, Tolerance, overall_error, stored_in
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.doctor.ways import WAY_OUT, obstacle_of, ways
from fluxfast.memory.stream import stream_blocks
from fluxfast.model.graphs import STEPS_RUN_FIRST
from fluxfast.model.room import make_room_for_adapters
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops import dispatch, verdicts
from fluxfast.quant import FORMATS
from fluxfast.quant.linear import QuantLinear
from fluxfast.quant.rules import quantize_model

# the error of a whole block, by what its products run in: activations are rounded to 16 bits,
# and the inputs of 8-bit products to 8
BLOCK_TOLERANCES = {
    "same": Tolerance(0.04, "some twenty roundings to 16 bits one after the other"),
    "int8": Tolerance(0.08, "products whose inputs and gradients are rounded to 127 steps"),
    "e4m3": Tolerance(0.15, "products whose inputs and gradients are rounded to 3 bits"),
}
BLOCK_FP32 = Tolerance(1e-4, "fp32 arithmetic of some twenty ops in another order")
REPLAYED = {
    "float32": Tolerance(1e-4, "fp32 sums that atomic additions may have in another order"),
    "bfloat16": Tolerance(
        2e-2, "sums that atomic additions may have in another order, rounded to bfloat16"
    ),
}
SAME_BITS = Tolerance(0.0, "the same operations on the same bytes")


def config_of(scope: Scope, singles: int = 1) -> dict[str, Any]:
    """FLUX.1-dev's config with fewer blocks, and on a CPU with fewer heads."""
    head = scope.sizes.head_dim
    return {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": singles,
        "attention_head_dim": head,
        "num_attention_heads": scope.sizes.model_heads,
        "joint_attention_dim": 32 * head,
        "pooled_projection_dim": 6 * head,
        "guidance_embeds": True,
        "axes_dims_rope": (head // 8, 7 * head // 16, 7 * head // 16),
    }


def build(
    scope: Scope, fmt: str, compute: str, *, singles: int = 1, impl: str = "auto", seed: int = 0
) -> Any:
    """The model as a run has it: frozen, in the format, with adapters, packed.

    Its weights are random, and its adapters large enough to show errors.
    """
    dtype, device = scope.torch_dtype, scope.torch_device
    with torch.device("meta"):
        model = FluxTransformer(**config_of(scope, singles))
    nn.Module.to(model.requires_grad_(False), dtype).to_empty(device=device)
    randn = Random(device, dtype, seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            near_one = "norm_" in name and name.endswith("weight")
            parameter.data = randn(*parameter.shape, scale=0.1) + (1 if near_one else 0)
        else:
            parameter.data = randn(*parameter.shape, scale=parameter.shape[-1] ** -0.5)
    if fmt != PLAIN:
        quantize_model(model, FORMATS[fmt])
    _add_adapters(model, scope)
    pack_groups(model)
    model.set_compute(compute, 0 if compute == "same" else scope.outliers)
    make_room_for_adapters(model.blocks)
    for block in model.blocks:
        block.impl = impl
    return model.train()


def _add_adapters(model: Any, scope: Scope, dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    parameters = add_lora(
        model,
        targets="all+ffs",
        rank=scope.rank,
        dtype=dtype or getattr(torch, scope.adapter_dtype),
    )
    # a fresh adapter's B is zero, which would hide errors; every dtype gets the same values
    randn = Random(scope.torch_device, getattr(torch, scope.adapter_dtype), seed=1)
    for parameter in parameters:
        parameter.data = randn(*parameter.shape, scale=0.5 * parameter.shape[1] ** -0.5).to(
            parameter.dtype
        )
    return parameters


def inputs_of(scope: Scope, seed: int, image: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The model's inputs; its ids are the positions in an image."""
    rows, cols = image or scope.sizes.image
    randn, config, batch = (
        Random(scope.torch_device, scope.torch_dtype, seed),
        config_of(scope),
        scope.sizes.batch,
    )
    ids = torch.zeros(rows, cols, 3, device=scope.torch_device)
    ids[..., 1] += torch.arange(rows, device=ids.device)[:, None]
    ids[..., 2] += torch.arange(cols, device=ids.device)[None]
    return {
        "hidden_states": randn(batch, rows * cols, config["in_channels"]),
        "encoder_hidden_states": randn(batch, scope.sizes.text, config["joint_attention_dim"]),
        "pooled_projections": randn(batch, config["pooled_projection_dim"]),
        # the model multiplies both by 1000, which is exact for these
        "timestep": 0.5 ** torch.arange(1, batch + 1, device=ids.device, dtype=scope.torch_dtype),
        "guidance": torch.full((batch,), 4.0, device=ids.device, dtype=scope.torch_dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(scope.sizes.text, 3, device=ids.device),
    }


def run(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradients of all adapters as one vector.

    The model's own gradients are cleared.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    prediction = model(**inputs, return_dict=False)[0]
    prediction.float().square().mean().backward()
    flat = torch.cat([p.grad.detach().flatten().float() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return prediction.detach().float().clone(), flat


def _reference(
    model: Any, scope: Scope, inputs: dict[str, Tensor], singles: int = 1
) -> tuple[Tensor, Tensor]:
    """The same from diffusers' model and PEFT in fp32, on the weights as they are stored."""
    with torch.device("meta"):
        reference = FluxTransformer2DModel(**config_of(scope, singles))
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        for of_module, parameter in module.named_parameters(recurse=False):
            if "lora_" not in name:
                weights[f"{name}.{of_module}".replace(".base_layer", "")] = (
                    parameter.detach().float()
                )
        if isinstance(module, QuantLinear):
            stored = module.packed().to(torch.float32)
            weights[f"{name}.weight".replace(".base_layer", "")] = stored
    reference.load_state_dict(weights, assign=True)
    _add_adapters(reference, scope, torch.float32)
    return run(reference.train(), {name: x.float() for name, x in inputs.items()})


def _tolerance(scope: Scope, compute: str) -> Tolerance:
    return (
        BLOCK_FP32 if compute == "same" and scope.dtype == "float32" else BLOCK_TOLERANCES[compute]
    )


def _check_blocks(scope: Scope, fmt: str, compute: str, impl: str) -> Finding:
    model, inputs = build(scope, fmt, compute, impl=impl), inputs_of(scope, seed=3)
    tolerance = _tolerance(scope, compute)
    expected, parts = _reference(model, scope, inputs), []
    adapters = getattr(torch, scope.adapter_dtype)
    # beside fp32 arithmetic, storing gradients in 16 bits is the largest rounding
    stored = (
        stored_in(adapters) if tolerance is BLOCK_FP32 and adapters.itemsize == 2 else tolerance
    )
    for policy in ("full", "none"):
        model.set_recompute(policy)
        prediction, gradients = run(model, inputs)
        parts.append(
            Part(
                f"prediction, recompute {policy}", overall_error(prediction, expected[0]), tolerance
            )
        )
        parts.append(
            Part(f"gradients, recompute {policy}", overall_error(gradients, expected[1]), stored)
        )
    return Finding(tuple(parts))


def turn_graphs_on(model: Any) -> None:
    """Let CUDA graphs replay the model's steps."""
    model.set_cuda_graphs(True)


def graphs_obstacle(scope: Scope) -> str | None:
    return None if scope.torch_device.type == "cuda" else "only a GPU has CUDA graphs"


def _steps(model: Any, batches: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A forward and backward for each batch.

    The adapters change in place between them, as under an optimiser, and are restored at the end.
    """
    found = []
    with torch.no_grad():
        before = [(p, p.clone()) for p in model.parameters() if p.requires_grad]
    for inputs in batches:
        found.append(run(model, inputs))
        with torch.no_grad():
            for parameter, _ in before:
                parameter.mul_(1.1)
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)
    return found


def _check_graphs(scope: Scope, fmt: str, compute: str) -> Finding:
    """Steps of two shapes in one memory pool, replayed as graphs beside the same steps run eagerly.

    Each shape is run, captured, and then replayed on other inputs. The graphs compare the first
    replay with an eager step themselves, and raise if it differs.
    """
    model = build(scope, fmt, compute)
    model.set_recompute("full")
    rows, cols = scope.sizes.image
    # the steps of each shape: those that run eagerly, the one that is captured, two replayed ones
    each = STEPS_RUN_FIRST + 3
    batches = [
        inputs_of(scope, seed, (cols, rows + 1) if seed % 2 else None) for seed in range(2 * each)
    ]
    expected = _steps(model, batches)
    turn_graphs_on(model)
    actual, parts = _steps(model, batches), []
    for number in range(2 * (each - 2), 2 * each):
        for name, one, other in zip(
            ("prediction", "gradients"), actual[number], expected[number], strict=True
        ):
            what = f"{name}, step {number // 2 + 1}, shape {number % 2 + 1}"
            parts.append(Part(what, overall_error(one, other), REPLAYED[scope.dtype]))
    return Finding(tuple(parts))


def _check_streamed(scope: Scope, fmt: str, compute: str) -> Finding:
    """Three blocks through a ring of two slots, twice, beside the same blocks resident."""
    model, inputs, parts = build(scope, fmt, compute, singles=2), inputs_of(scope, seed=4), []
    model.set_recompute("full")
    for block in model.blocks:
        # other back ends of attention may sum in another order each time
        block.attention = "ref"
    expected = run(model, inputs)
    frozen = [[t.clone() for t in _frozen(block)] for block in model.blocks]
    stream = stream_blocks(model, scope.torch_device, slots=2)
    try:
        for step in (1, 2):
            for name, actual, exact in zip(
                ("prediction", "gradients"), run(model, inputs), expected, strict=True
            ):
                parts.append(
                    Part(f"{name}, step {step}", overall_error(actual, exact), _streamed(scope))
                )
        with torch.no_grad():
            stream.begin()
            for index, (block, tensors) in enumerate(zip(model.blocks, frozen, strict=True)):
                with stream.use(index, "forward"):
                    # here the copy has been waited for, so kernels would read the tensors now
                    wrong = sum(
                        not torch.equal(a, b) for a, b in zip(_frozen(block), tensors, strict=True)
                    )
                parts.append(Part(f"tensors of block {index}", float(wrong), SAME_BITS))
    finally:
        stream.close()
    return Finding(tuple(parts), stream.shortfall or "")


def _frozen(block: nn.Module) -> list[Tensor]:
    """A block's own tensors, as bytes."""
    tensors = [*(p for p in block.parameters() if not p.requires_grad), *block.buffers()]
    return [t.detach().contiguous().view(torch.uint8) for t in tensors]


def _streamed(scope: Scope) -> Tolerance:
    """The tolerance: a GPU's library may choose another kernel for weights at another address."""
    return SAME_BITS if scope.torch_device.type == "cpu" else REPLAYED[scope.dtype]


def _modes(scope: Scope, impl: str) -> list[tuple[str, str]]:
    """(format, type of products) of the models to build.

    Not every pair: products over every format are checked by themselves (`linear_checks`).
    """
    if scope.interpreted and impl == "triton":
        # each takes half a minute in the interpreter
        return [(PLAIN, "same")] if scope.exhaustive else []
    if not scope.exhaustive:
        return [(fmt, compute) for compute in scope.computes for fmt in scope.formats]
    own = [
        (fmt, format.stored_codes)
        for fmt, format in FORMATS.items()
        if format.stored_codes in scope.computes
    ]
    mixed = [(PLAIN, compute) for compute in scope.computes] + [
        (fmt, "same") for fmt in scope.formats if fmt != PLAIN
    ]
    return mixed + own


def model_checks(scope: Scope) -> Iterator[Check]:
    """Blocks in each mode; graphs and streaming in one, with the base that is stored smallest."""
    for impl, said, isa in ways(scope):
        if isa is not None and isa != dispatch.native.cpu_isa():
            continue
        for fmt, compute in _modes(scope, impl):
            what, way = (
                (verdicts.FUSED_BLOCK, impl) if compute == "same" else (verdicts.COMPUTE, compute)
            )
            runs = "" if compute == "same" else f", products in {compute}"
            yield Check(
                name=f"blocks, {fmt} weights{runs} ({said})",
                run=functools.partial(_check_blocks, scope, fmt, compute, impl),
                what=what,
                way=way,
                obstacle=obstacle_of(impl, scope),
                way_out=f"`auto` runs blocks op by op. {WAY_OUT[impl].partition('. ')[2]}",
            )
    fmt, compute = scope.formats[-1], scope.computes[min(1, len(scope.computes) - 1)]
    if scope.graphs:
        yield Check(
            name="CUDA graphs",
            run=functools.partial(_check_graphs, scope, fmt, compute),
            what=verdicts.GRAPHS,
            way=verdicts.ONLY_WAY,
            obstacle=graphs_obstacle(scope),
            way_out=(
                '"cuda_graphs": false runs steps eagerly. Another driver or PyTorch may cure it'
            ),
        )
    if scope.streams:
        yield Check(
            name="streamed blocks",
            run=functools.partial(_check_streamed, scope, fmt, compute),
            what=verdicts.STREAMING,
            way=verdicts.ONLY_WAY,
            way_out=(
                '"enable_group_offload": false keeps blocks on the device. Another driver may '
                "cure it"
            ),
        )
