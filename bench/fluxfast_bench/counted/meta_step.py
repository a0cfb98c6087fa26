"""One full-size training step on meta tensors, which have shapes and take no memory.

Meta tensors stand for tensors on a GPU, and what depends on the device is chosen as on one:
attention is a flash kernel, RMSNorm is one kernel each way, and fluxfast's ops call their Triton
launchers, which report what they would launch. Fake tensors on "cuda" would not do: on a build of
torch without CUDA, autograd aborts on them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from fluxfast.adapters.lora import add_lora
from fluxfast.checkpoint.empty_model import linears, quantize_empty
from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.modulation import linear_names
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops.device import OnLaunch, pretend
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import KEPT
from fluxfast_bench.counted.launches import Launch, launch_of
from fluxfast_bench.shapes import Shape, model_inputs
from fluxfast_bench.step.contestants import TARGETS, add_adapter
from fluxfast_bench.step.ours import ready

# the reference workload's adapters, on every linear of the blocks
RANK = 16


def build(
    cls: type[FluxTransformer2DModel], shape: Shape, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A frozen transformer of class `cls` on meta tensors."""
    with torch.device("meta"):
        model = cls(**shape.config)
    # diffusers' own `to` warns of modules that it would rather see in fp32, of which there are none
    return nn.Module.to(model, dtype).requires_grad_(False).train()


def diffusers_model(shape: Shape, *, adapters: torch.dtype) -> Any:
    """diffusers' transformer with PEFT's LoRA, in training mode, checkpointed."""
    model = build(FluxTransformer2DModel, shape)
    add_lora(model, targets=TARGETS, rank=RANK, dtype=adapters)
    model.enable_gradient_checkpointing()
    return model.train()


def fluxfast_model(
    shape: Shape,
    *,
    adapters: torch.dtype,
    format: str | None = None,
    compute: str = "same",
    recompute: str = "full",
    transposed_codes: bool = False,
    target: str = "sm_90",
    adapter: str = "LoRA",
) -> Any:
    """fluxfast's transformer with the same LoRA, its base stored in `format` (None: bf16).

    It is ready for a GPU of the architecture `target`. transposed_codes: whether its stored codes
    have a transposed copy, which dgrad reads. adapter: as a contestant has it. Modulation is
    computed ahead, as in a run; `host_tensors` are its weights.
    """
    model = build(FluxTransformer, shape)
    if format is not None:
        quantize_empty(model, FORMATS[format], linears(model, KEPT), torch.bfloat16)
    add_adapter(model, adapter, rank=RANK, dtype=adapters)
    with pretend(target, None):
        ready(
            model,
            compute=compute,
            recompute=recompute,
            ahead=True,
            transposed_codes=transposed_codes,
        )
    FlatGradients(model)
    return model


def host_tensors(model: Any) -> list[Tensor]:
    """What would be in host memory: the weights of modulation that is computed ahead."""
    modules = [model.get_submodule(name) for name in linear_names(model.config)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def inputs_of(shape: Shape) -> dict[str, Tensor]:
    """A batch's inputs in bf16, and the fp32 target as "target"."""
    inputs = model_inputs(shape, torch.device("meta"), torch.bfloat16)
    return inputs | {"target": torch.empty_like(inputs["hidden_states"], dtype=torch.float32)}


def forward_backward(model: Any, inputs: dict[str, Tensor]) -> None:
    """Forward, loss and backward, as the trainer has them."""
    if (gradients := getattr(model, "gradients", None)) is not None:
        # those of an earlier step
        gradients.forget()
    inputs = dict(inputs)
    target = inputs.pop("target")
    prediction = model(**inputs, return_dict=False)[0]
    torch.nn.functional.mse_loss(prediction.float(), target).backward()


class _RmsNorm(torch.autograd.Function):
    """RMSNorm as on a GPU: a kernel each way; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        y, rstd = _rms_norm_fwd(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _rms_norm_bwd(grads[0], *ctx.saved_tensors), None


@torch.library.custom_op("fluxfast_bench::rms_norm_fwd", mutates_args=())
def _rms_norm_fwd(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("it has shapes only")


@torch.library.custom_op("fluxfast_bench::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    raise NotImplementedError("it has shapes only")


@_rms_norm_fwd.register_fake
def _(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@_rms_norm_bwd.register_fake
def _(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    assert attn_mask is None, "flash attention takes no mask"
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _one_rms_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RmsNorm.apply(x, weight)


@contextlib.contextmanager
def as_on_gpu(on_launch: OnLaunch, target: str = "sm_90") -> Iterator[None]:
    """Meta tensors stand for a GPU's; `on_launch` hears of each of our kernels' launches.

    diffusers' own model, which stands beside ours, calls attention and RMSNorm through torch, and
    torch takes both apart on meta tensors. So torch's two functions are exchanged meanwhile for
    what a GPU would run: flash attention, and one kernel each way. (A TorchFunctionMode would not
    do: it does not reach the thread in which checkpoints are recomputed.)
    """
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention, functional.rms_norm
    functional.scaled_dot_product_attention = _flash_attention
    functional.rms_norm = _one_rms_norm  # type: ignore[assignment]
    try:
        with pretend(target, on_launch):
            yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = before


def recorded(run: Callable[[], object], target: str = "sm_90") -> Counter[Launch]:
    """The launches of `run`, which works on meta tensors, and how often each comes."""
    found: Counter[Launch] = Counter()
    with as_on_gpu(
        lambda kernel, args, numbers: found.update([launch_of(kernel, args, numbers)]), target
    ):
        run()
    return found
