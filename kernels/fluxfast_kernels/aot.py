"""Kernels compiled ahead of time, for GPUs that need not be there.

A variant is one kernel as Triton's JIT would specialise it. Variants are recorded, not written
down: an op's `aot_cases()` names calls of its launchers on meta tensors, and what a call would have
launched on a target is the variant. So the two cannot drift apart.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fluxfast_kernels.launch import interpreted, pretend

# what `fluxfast-bench aot` compiles for, by the key of launch tables: Triton's back end, its
# architecture, and the threads of a warp
AOT_TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}

EVERY_TARGET: tuple[str, ...] = tuple(AOT_TARGETS)
# the targets on which Triton converts to e4m3fn
E4M3_TARGETS: tuple[str, ...] = ("sm_89", "sm_90", "gfx942", "gfx1100")


@dataclass(frozen=True)
class AotVariant:
    """One kernel as a launcher would specialise it, for compiling without a device.

    `signature` has the Triton type of each argument ("*bf16", "i32", "fp32"), and `constexprs` the
    values of those that are compile-time constants; an absent pointer is a constant None.
    `num_warps` and `num_stages` are None where the launcher leaves them to the back end. Triton's
    key of a compiled kernel depends on that. `divisible` names the integers that are multiples of
    16, which the compiler may rely on; pointers always are. `targets` has keys of AOT_TARGETS.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int | None = None
    num_stages: int | None = None
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = EVERY_TARGET


# a name, a call of launchers on meta tensors, and the targets that it is for
AotCase = tuple[str, Callable[[], object], Sequence[str]]


def compile_ahead(variant: AotVariant, target: str) -> Any:
    """Triton's compiled kernel, with `.asm` and `.metadata`, for a key of AOT_TARGETS.

    It needs no device. Under Triton's interpreter nothing can be compiled.
    """
    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={name: variant.constexprs[name] for name in names if types[name] == "constexpr"},
        attrs=_attributes(variant, types),
    )
    named = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options = {name: number for name, number in named.items() if number is not None}
    return triton.compile(source, target=GPUTarget(*AOT_TARGETS[target]), options=options)


def _attributes(variant: AotVariant, types: Mapping[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """What Triton's JIT notes of each argument: a multiple of 16, or that it looked and found none.

    The notes are a part of its key of a compiled kernel, so they have to be exactly the JIT's.
    """
    attributes = {}
    for i, param in enumerate(variant.kernel.params):
        kind = types[param.name]
        if kind.startswith("*") or param.name in variant.divisible:
            attributes[i,] = [["tt.divisibility", 16]]
        elif kind == "constexpr" or (kind.startswith("i") and not param.do_not_specialize):
            attributes[i,] = []
    return attributes


_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def variant_of(
    kernel: Any, args: Sequence[Any], numbers: Mapping[str, Any], target: str
) -> AotVariant:
    """The variant that Triton's JIT would make of a launch for a key of AOT_TARGETS.

    As in the JIT, an absent pointer and an integer that is 1 become constants.
    """
    options = {k: v for k, v in numbers.items() if k in ("num_warps", "num_stages")}
    signature, divisible = {}, []
    constexprs = {k: v for k, v in numbers.items() if k not in options}
    for param, arg in zip(kernel.params, args, strict=False):
        fixed = param.do_not_specialize
        if isinstance(arg, Tensor):
            signature[param.name] = f"*{_TRITON_TYPES[arg.dtype]}"
        elif isinstance(arg, float):
            signature[param.name] = "fp32"
        elif arg is None or param.is_constexpr or (arg == 1 and not fixed):
            constexprs[param.name] = arg
        else:
            signature[param.name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
            if arg % 16 == 0 and not fixed:
                divisible.append(param.name)
    return AotVariant(
        kernel.__name__.removesuffix("_kernel"),
        kernel,
        signature,
        constexprs,
        divisible=tuple(divisible),
        targets=(target,),
        **options,
    )


def record_variants(cases: Iterable[AotCase]) -> list[AotVariant]:
    """The variants of every launch that the cases make, for each of their targets.

    The list is empty under Triton's interpreter, which compiles nothing.
    """
    variants: list[AotVariant] = []
    if interpreted():
        return variants
    for name, call, targets in cases:
        for target in targets:
            found: list[AotVariant] = []

            def record(kernel: Any, args: tuple[Any, ...], numbers: Mapping[str, Any]) -> None:
                found.append(variant_of(kernel, args, numbers, target))  # noqa: B023

            with pretend(target, record):
                call()
            variants += [replace(variant, name=f"{variant.name}-{name}") for variant in found]
    return variants
