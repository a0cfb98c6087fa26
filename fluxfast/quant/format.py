"""What a storage format is: a way to keep a frozen linear's weight [N, K] in few bits, and to get
it back.

A quantised weight is a dict of plain tensors, its parts: codes, and whatever scales them.
Quantising and dequantising are done in fp32 with IEEE arithmetic in a stated order, so that every
implementation (`impl`: triton, native, ref) gives the same bytes.

A new format is a subclass of `Format` with a `name`, `layout`, `quantize_ref` and `dequantize_ref`,
and a line in `fluxfast.quant.FORMATS`. That is enough for everything to work. Native code and
Triton kernels make it fast: they are four more methods, and `auto` takes those that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.tensors import dense_rows
from fluxfast.quant import gpu
from fluxfast.quant.rows import FLOAT_TYPES

Parts = dict[str, Tensor]
# rows (output features) and columns (input features) of the weight
Shape = tuple[int, int]

# what there is to do with a format, and the methods that do it: `<verb>_native`, `<verb>_triton`
_VERBS = {"quantize": "quantize", "dequantize": "decode", "codes": "decode"}


class Format:
    """One storage format. Instances hold no state."""

    name: ClassVar[str]
    # a part in which a NaN or an infinity anywhere in the weight leaves a NaN or an infinity
    witness: ClassVar[str] = "scale"
    # the key of `row_quant.FORMATS` whose codes and scales the parts packed and scale are
    stored_codes: ClassVar[str | None] = None
    # what the native module does on a GPU, too: "quantize"; "dequantize", to bf16
    gpu_tasks: ClassVar[tuple[str, ...]] = ()

    def layout(self, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a weight of `shape`."""
        raise NotImplementedError

    def quantize_ref(self, weight: Tensor) -> Parts:
        """The parts of weight [N, K] fp32, in plain torch: the definition of the format."""
        raise NotImplementedError

    def dequantize_ref(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The weight [N, K] fp32, in plain torch."""
        raise NotImplementedError

    def quantize_native(self, weight: Tensor) -> Parts:
        """The same as `quantize_ref` by the native module, on the CPU.

        weight is in a dtype of FLOAT_TYPES and its columns are contiguous. With "quantize" in
        gpu_tasks, it may also be on a GPU.
        """
        raise NotImplementedError

    def quantize_triton(self, weight: Tensor) -> Parts:
        """The same by Triton's kernels."""
        raise NotImplementedError

    def decode_native(
        self, parts: Mapping[str, Tensor], out: Tensor, out_scale: Tensor | None
    ) -> None:
        """Writes the weight into `out` [N, K], contiguous, by the native module, on the CPU.

        It writes values in a dtype of FLOAT_TYPES; or codes, in a dtype of `row_quant.FORMATS`, and
        their scales into `out_scale` [N] fp32. With "dequantize" in gpu_tasks, it also writes
        values in bf16 on a GPU.
        """
        raise NotImplementedError

    def decode_triton(
        self,
        parts: Mapping[str, Tensor],
        out: Tensor,
        out_scale: Tensor | None,
        transposed: Tensor | None,
        outs: Sequence[int],
    ) -> None:
        """The same by Triton's kernels, which take an `out` whose rows are any distance apart.

        They write the codes in the other order, too, where there is a `transposed` [K, N] for them.
        outs: the rows of each weight, where the parts are those of several that `decodes_joined`.
        """
        raise NotImplementedError

    def decodes_joined(self, shape: Shape) -> bool:
        """Whether Triton's kernels decode a weight of `shape` together with others below it.

        Each part of theirs then comes as one, the weights' one after the other.
        """
        return False

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight at FLUX.1's sizes, with everything that scales the codes."""
        shape = (3072, 3072)
        sizes = [math.prod(size) * dtype.itemsize for size, dtype in self.layout(shape).values()]
        return round(8 * sum(sizes) / math.prod(shape), 3)

    def lacks(self, task: str, backend: str) -> str | None:
        """Why a backend ("native" or "triton") can't do a task: the format has no code for it.

        Tasks are "quantize", "dequantize" and "codes". None where there is code.
        """
        method = f"{_VERBS[task]}_{backend}"
        if getattr(type(self), method) is not getattr(Format, method):
            return None
        return f"{self.name} has its reference for that, and nothing in {backend}"

    def implementation(
        self, task: str, impl: str, tensor: Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> dispatch.Backend:
        """The backend that does a task with a tensor where `impl` is asked for.

        dtype: of the values that are decoded. Raises ValueError on an `impl` that can't.
        """
        if impl == "native" and tensor.is_cuda:
            if (why := self._native_gpu_obstacle(task, dtype)) is not None:
                raise ValueError(
                    f"{self.name}.{task}: impl='native' can't do this call: {why}; use "
                    "impl='auto' or impl='ref'"
                )
            return "native"
        # what is computed is fp32, whatever it is stored in
        like = tensor.new_empty(0, dtype=torch.float32)
        return dispatch.resolve(
            f"{self.name}.{task}",
            impl,
            (like,),
            native_obstacle=self.lacks(task, "native"),
            triton_obstacle=self.lacks(task, "triton"),
        )

    def _native_gpu_obstacle(self, task: str, dtype: torch.dtype) -> str | None:
        if task not in self.gpu_tasks:
            return f"on a GPU the native module doesn't {task} this format"
        if dtype != torch.bfloat16:
            return f"on a GPU the native module decodes to torch.bfloat16, not to {dtype}"
        return gpu.obstacle()

    def quantize(self, weight: Tensor, *, impl: str = "auto") -> Parts:
        """The parts of weight [N, K], of any floating dtype and strides, on its device.

        fp64 is rounded to fp32 first. Raises ValueError on another shape or dtype, on a NaN or an
        infinity, naming where it is, and on an `impl` that can't.
        """
        floats = (*FLOAT_TYPES, torch.float64)
        if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in floats:
            raise ValueError(
                f"{self.name}: expected a weight [out, in] of a floating dtype, got "
                f"{list(weight.shape)} {weight.dtype}"
            )
        backend = self.implementation("quantize", impl, weight)
        rows = weight.detach()
        if backend == "ref" or weight.dtype not in FLOAT_TYPES:
            rows = rows.to(torch.float32)
        parts: Parts = getattr(self, f"quantize_{backend}")(dense_rows(rows))
        if not parts[self.witness].isfinite().all():
            raise ValueError(
                f"{self.name}: {_why_not_finite(weight)}; check the checkpoint that it came from"
            )
        return parts

    def empty(self, shape: Shape, device: torch.device | str | None = None) -> Parts:
        """Uninitialised parts of a weight of `shape`, to load into."""
        return {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in self.layout(shape).items()
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _why_not_finite(weight: Tensor) -> str:
    places = (~weight.isfinite()).nonzero()
    if len(places) == 0:
        return (
            f"the weight {list(weight.shape)} reaches {weight.abs().max().item():g}, which is "
            "too large for fp32 scales"
        )
    row, col = places[0].tolist()
    return (
        f"the weight {list(weight.shape)} holds {weight[row, col].item()} at [{row}, {col}], "
        "and must be finite"
    )
