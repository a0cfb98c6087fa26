"""Storage formats: their quantisers and decoders, beside their definitions in plain torch.

Also modulation's products on the CPU. All implementations of a format should give the same bytes.
A check fails where a value differs so much that a run would notice; other bytes are only a note.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fluxfast.doctor.checks import (
    Check,
    Finding,
    Part,
    Random,
    Rate,
    Tolerance,
    of_products,
    poisoned_memory,
    relative_error,
)
from fluxfast.doctor.op_cases import decoded
from fluxfast.doctor.scope import PLAIN, Scope
from fluxfast.doctor.timing import seconds_of
from fluxfast.doctor.ways import NO_NATIVE_BUILD, WAY_OUT, obstacle_of, ways, with_isa
from fluxfast.ops import dispatch
from fluxfast.quant import FORMATS, QuantWeight, gpu
from fluxfast.quant.gemv import gemv, gemv_ref, has_native_gemv

_SAME_CODES = Tolerance(1e-3, "a few codes whose value lies half-way between two")


def weights_of(scope: Scope) -> list[Tensor]:
    """A weight of real width, and a small one whose sizes are multiples of nothing.

    Their rows differ in size, and one of them is zero.
    """
    randn = Random(scope.torch_device, torch.float32, seed=9)
    made = []
    for rows, cols in ((scope.sizes.weights, scope.sizes.dim), (5, 63)):
        weight = 0.02 * randn(rows, cols) * randn(rows, 1).exp()
        weight[1] = 0
        made.append(weight)
    return made


def _check_decoder(scope: Scope, fmt: str, impl: str, *, native_gpu: bool) -> Finding:
    """The weight in the activations' dtype, decoded from parts that the reference made."""
    format, parts, different = FORMATS[fmt], [], 0
    dtype = torch.bfloat16 if native_gpu else scope.torch_dtype
    rounding = Tolerance(
        torch.finfo(dtype).eps, f"a rounding to {str(dtype).removeprefix('torch.')}"
    )
    for weight in weights_of(scope):
        stored = QuantWeight.of(weight, format, impl="ref")
        with poisoned_memory():
            actual = stored.to(dtype, impl=impl)
        expected = stored.to(dtype, impl="ref")
        different += int((actual != expected).sum())
        error = relative_error(actual, expected)
        parts.append(Part(f"weight {list(weight.shape)}", error, rounding))
    return Finding(
        tuple(parts),
        f"{different} weights are not bit for bit the reference's" if different else "",
    )


def _time_decoder(scope: Scope, fmt: str, impl: str) -> Rate:
    """Bytes a second of the parts and the weight together."""
    format, shape = FORMATS[fmt], (scope.sizes.dim, scope.sizes.dim)
    weight = Random(scope.torch_device, torch.float32, seed=9)(*shape, scale=0.02)
    stored = QuantWeight.of(weight, format)
    out = torch.empty(shape, dtype=scope.torch_dtype, device=scope.torch_device)
    seconds = seconds_of(lambda: stored.decode_into(out, impl=impl), scope.torch_device)
    return Rate((out.nbytes + stored.nbytes) / seconds, "B/s")


def _check_codes(scope: Scope, fmt: str, impl: str) -> Finding:
    """The weight as the codes of an 8-bit product."""
    format, parts = FORMATS[fmt], []
    for compute in scope.computes:
        for weight in weights_of(scope) if compute != "same" else ():
            stored = QuantWeight.of(weight, format, impl="ref")
            with poisoned_memory():
                made = stored.codes(compute, impl=impl)
            expected = stored.codes(compute, impl="ref")
            error = relative_error(decoded(made), decoded(expected))
            parts.append(Part(f"{compute} codes {list(weight.shape)}", error, _SAME_CODES))
    return Finding(tuple(parts))


def _check_quantizer(scope: Scope, fmt: str, impl: str) -> Finding:
    """What the quantiser's parts decode to, beside what the reference's decode to."""
    format, parts, different = FORMATS[fmt], [], 0
    for weight in weights_of(scope):
        shape = (weight.shape[0], weight.shape[1])
        with poisoned_memory():
            made = format.quantize(weight, impl=impl)
        definition = format.quantize(weight, impl="ref")
        different += sum(
            int((made[n].view(torch.uint8) != p.view(torch.uint8)).sum())
            for n, p in definition.items()
        )
        actual, expected = (format.dequantize_ref(stored, shape) for stored in (made, definition))
        parts.append(Part(f"weight {list(shape)}", relative_error(actual, expected), _SAME_CODES))
    return Finding(tuple(parts), f"{different} bytes are not the reference's" if different else "")


# the tasks of a format, in the words of the checks' names
_TASKS = {"dequantize": "decoded", "quantize": "quantised", "codes": "decoded to codes"}


def format_checks(scope: Scope) -> Iterator[Check]:
    """The quantiser and the decoders of every format in use."""
    for fmt in (fmt for fmt in scope.formats if fmt != PLAIN):
        decode = functools.partial(_check_decoder, native_gpu=False)
        tasks: dict[str, Any] = {"dequantize": decode, "quantize": _check_quantizer}
        if any(compute not in ("same", FORMATS[fmt].stored_codes) for compute in scope.computes):
            tasks["codes"] = _check_codes
        for task, run in tasks.items():
            for impl, said, isa in ways(scope):
                counts = isa is None or isa == dispatch.native.cpu_isa()
                timed = counts and scope.sizes.timed
                yield Check(
                    name=f"{fmt}: {_TASKS[task]} ({said})",
                    run=with_isa(functools.partial(run, scope, fmt, impl), isa),
                    what=f"{fmt}.{task}" if counts else "",
                    way=impl if counts else "",
                    short=True,
                    time=functools.partial(_time_decoder, scope, fmt, impl)
                    if timed and task == "dequantize"
                    else None,
                    # weights are decoded in fp32 whatever the activations are in
                    obstacle=FORMATS[fmt].lacks(task, impl)
                    or obstacle_of(impl, replace(scope, dtype="float32")),
                    way_out=WAY_OUT[impl],
                )
        yield from _native_gpu_checks(scope, fmt)


def _native_gpu_checks(scope: Scope, fmt: str) -> Iterator[Check]:
    """The native module's own GPU kernels, which run only if asked for: `auto` never takes them."""
    if scope.torch_device.type != "cuda" or not scope.exhaustive:
        return
    runs: dict[str, Any] = {
        "quantize": functools.partial(_check_quantizer, scope, fmt, "native"),
        "dequantize": functools.partial(_check_decoder, scope, fmt, "native", native_gpu=True),
    }
    for task in FORMATS[fmt].gpu_tasks:
        yield Check(
            name=f"{fmt}: {_TASKS[task]} (native, on the GPU)",
            run=runs[task],
            what=f"{fmt}.{task}",
            way="native",
            obstacle=gpu.obstacle(),
            way_out="nothing takes it unless it is asked for",
        )


def _gemv_weight(scope: Scope, fmt: str, rows: int) -> Tensor | QuantWeight:
    weight = Random(torch.device("cpu"), torch.float32, seed=10)(
        rows, scope.sizes.dim, scale=scope.sizes.dim**-0.5
    )
    if fmt == PLAIN:
        return weight.bfloat16()
    return QuantWeight.of(weight, FORMATS[fmt])


def _check_gemv(scope: Scope, fmt: str) -> Finding:
    weight, parts = _gemv_weight(scope, fmt, 63), []
    for batch in (1, 3):
        x = Random(torch.device("cpu"), torch.float32, seed=batch)(batch, scope.sizes.dim)
        error = relative_error(gemv(x, weight, impl="native"), gemv_ref(x.double(), weight))
        parts.append(Part(f"y of {batch}", error, of_products(torch.float32)("y")))
    return Finding(tuple(parts))


def time_gemv(scope: Scope, fmt: str) -> Rate:
    """Bytes a second of a weight, in a product with one vector on the CPU."""
    weight = _gemv_weight(scope, fmt, 18 * scope.sizes.dim // 4)
    x = Random(torch.device("cpu"), torch.float32)(1, scope.sizes.dim)
    return Rate(
        weight.nbytes / seconds_of(lambda: gemv(x, weight, impl="native"), torch.device("cpu")),
        "B/s",
    )


def _gemv_obstacle(fmt: str) -> str | None:
    if not dispatch.HAS_NATIVE:
        return NO_NATIVE_BUILD
    if fmt == PLAIN or has_native_gemv(FORMATS[fmt]):
        return None
    return f"{fmt} is decoded by its reference: the native module doesn't read it"


def gemv_checks(scope: Scope) -> Iterator[Check]:
    """Modulation's products with vectors on the CPU, where a run computes it ahead."""
    if not scope.modulation_ahead:
        return
    said = f"native {dispatch.native.cpu_isa()}" if dispatch.HAS_NATIVE else "native"
    for fmt in scope.formats:
        yield Check(
            name=f"modulation ahead, {fmt} weights ({said})",
            run=functools.partial(_check_gemv, scope, fmt),
            time=functools.partial(time_gemv, scope, fmt) if scope.sizes.timed else None,
            what="gemv",
            way="native",
            short=True,
            obstacle=_gemv_obstacle(fmt),
            way_out=WAY_OUT["native"],
        )
