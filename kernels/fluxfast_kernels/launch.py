"""What every launcher needs: block sizes by architecture as data, and the launch itself.

An op's table maps an architecture key ("sm_90", "gfx942", …) to its numbers; "default" holds safe
ones for every target. Tuning on a device adds a row there and nothing else.

Triton is imported by what compiles or asks for it, not here: a plan reads the tables on machines
that have none.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LaunchTable = Mapping[str, Mapping[str, int]]

# For ops whose programs hold one row in registers. "per_thread": elements of the row per thread,
# which sets the number of warps. "widest": the largest piece of a row that a program takes, where
# it need not take the whole. "ROWS": rows per program, where it sums over them.
ROW_LAUNCH: dict[str, LaunchTable] = {
    "row_quant": {"default": {"per_thread": 32}},
    "dequant": {"default": {"per_thread": 16, "widest": 2048}},
    "dequant_quantized": {"default": {"per_thread": 32}},
    "quantize_affine": {"default": {"per_thread": 16, "widest": 1024}},
    "quantize_nf4": {"default": {"per_thread": 16, "widest": 2048}},
    "gated_residual_fwd": {"default": {"per_thread": 32}},
    "gated_residual_bwd": {"default": {"per_thread": 16, "ROWS": 1}},
    "gated_residual_bwd_sums": {"default": {"per_thread": 16, "ROWS": 16}},
    "token_route": {"default": {"per_thread": 32}},
    "dropout": {"default": {"per_thread": 8, "widest": 1024}},
    "gelu_fwd": {"default": {"per_thread": 16, "widest": 2048}},
    "gelu_fwd_quantized": {"default": {"per_thread": 32}},
    "gelu_bwd": {"default": {"per_thread": 16, "widest": 2048}},
    "gelu_bwd_quantized": {"default": {"per_thread": 32}},
    "modulated_layer_norm_fwd": {"default": {"per_thread": 32}},
    "qk_norm_rope_bwd_quantized": {"default": {"per_thread": 32}},
    "modulated_layer_norm_bwd": {"default": {"per_thread": 32, "ROWS": 1}},
    "modulated_layer_norm_bwd_sums": {"default": {"per_thread": 8, "ROWS": 16}},
}

# for ops whose programs take some of the heads of one token
HEAD_LAUNCH: dict[str, LaunchTable] = {
    "qk_norm_rope_fwd": {"default": {"HEADS": 8, "num_warps": 4}},
    "qk_norm_rope_bwd": {"default": {"HEADS": 8, "num_warps": 4}},
}

# 16 bytes of bf16 a thread
OPTIM_LAUNCH: LaunchTable = {
    "default": {"BLOCK": 1024, "num_warps": 4},
    "gfx942": {"BLOCK": 2048, "num_warps": 4},
}

# ROWS: blocks of 256 elements, each with a scale of its own, that a program updates. Not measured
BLOCKWISE_LAUNCH: LaunchTable = {"default": {"ROWS": 4, "num_warps": 4}}

# Which engine takes a wide product with float activations. A table is chosen by what W is; its rows
# are (most tokens, engine), and None means any number of tokens.
#   "library"    torch's GEMM, then a thin product for the adapters
#   "augmented"  torch's GEMM with the adapters beside W, where x and W have room for them, else as
#                "fused"; without adapters, torch's GEMM
#   "fused"      our kernel, with bias and adapters in its epilogue
#   "codes"      our kernel on W's stored codes, which it converts in registers
#   "decode"     W decoded to a scratch, then as "float"
# None of these choices is measured yet. "fused" and "augmented" save a launch and a pass over y for
# each linear with an adapter, which "library" needs. "augmented" takes 2 % more arithmetic than
# "fused" for cuBLAS's speed, which is expected to be ahead of our kernel's on chips with
# asynchronous tensor cores. A kernel that converts codes as it reads them wins as long as a tile of
# W is read once, up to about 64 tokens. To measure on a device: time a block, forward and backward,
# at FLUX.1's shapes and 16 to 4608 tokens, with one engine as "default", then with the other. The
# numbers of tokens where the faster one changes are the bounds of that architecture's row.
WideRows = tuple[tuple[int | None, str], ...]
WIDE_ENGINES: dict[str, dict[str, WideRows]] = {
    "float": {
        "default": ((None, "fused"),),
        "sm_90": ((None, "augmented"),),
    },
    "int8": {"default": ((64, "codes"), (None, "decode"))},
    # Triton converts e4m3 on these only
    "e4m3": {
        "default": ((None, "decode"),),
        **dict.fromkeys(("sm_89", "sm_90", "gfx942"), ((64, "codes"), (None, "decode"))),
    },
}


def wide_engine(kind: str, tokens: int, device: torch.device) -> str:
    """The engine of WIDE_ENGINES for so many tokens and a W of `kind`, "float" or its codes'."""
    rows = WIDE_ENGINES[kind]
    return next(
        name
        for most, name in rows.get(arch_key(device)) or rows["default"]
        if most is None or tokens <= most
    )


# rows of dy from which dgrad in 8 bits on a transposed copy of W's codes pays for making it, 0:
# never. Not measured yet: sm_90 has no 8-bit product of another order, and 512 rows are three times
# as much arithmetic as the copy is traffic
TRANSPOSE_FROM: LaunchTable = {"default": {"rows": 0}, "sm_90": {"rows": 512}}


def reads_transposed(arch: str) -> bool:
    """Whether 8-bit dgrad on GPUs of that key reads W's codes transposed, from whatever rows on."""
    return TRANSPOSE_FROM.get(arch, TRANSPOSE_FROM["default"])["rows"] > 0


def dgrad_transposes(rows: int, device: torch.device) -> bool:
    """Whether dgrad of so many rows makes itself a transposed copy of W's codes."""
    return 0 < launch_numbers(TRANSPOSE_FROM, device)["rows"] <= rows


def next_pow2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _arch_of(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def arch_key(device: torch.device) -> str:
    """A launch table's key for a device: "sm_90", "gfx942"; "default" where it is no GPU.

    Inside `pretend`, every device has the key of the GPU that it stands for.
    """
    if _pretence is not None:
        return _pretence.arch
    # a fake tensor may say "cuda" where there is none
    if device.type != "cuda" or not torch.cuda.is_available():
        return "default"
    return _arch_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """A GPU's multiprocessors (AMD: compute units); 0 where `device` stands for one or is none."""
    if _pretence is not None or device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return _multiprocessors_of(
        torch.cuda.current_device() if device.index is None else device.index
    )


def launch_numbers(table: LaunchTable, device: torch.device) -> Mapping[str, int]:
    """The row of `table` for a device: block sizes, num_warps, num_stages."""
    return table.get(arch_key(device)) or table["default"]


@functools.cache
def row_numbers(op: str, width: int, arch: str) -> Mapping[str, int]:
    """BLOCK, num_warps, and ROWS where the op has it, of an op of ROW_LAUNCH on rows of `width`."""
    numbers = dict(ROW_LAUNCH[op].get(arch) or ROW_LAUNCH[op]["default"])
    block = next_pow2(width)
    block = min(block, numbers.pop("widest", block))
    # a warp has 64 threads on gfx9 and 32 elsewhere; a program may have 1024 threads at most
    warp = 64 if arch.startswith("gfx9") else 32
    warps = min(max(block // (numbers.pop("per_thread") * warp), 1), 1024 // warp)
    return {"BLOCK": block, "num_warps": warps, **numbers}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


# a kernel, its arguments in order, and its launch numbers
OnLaunch = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Pretence:
    """The architecture that tensors stand for, and who hears of launches in place of a GPU."""

    arch: str
    on_launch: OnLaunch


_pretence: _Pretence | None = None


@contextlib.contextmanager
def pretend(arch: str, on_launch: OnLaunch) -> Iterator[None]:
    """Inside, tensors stand for tensors on a GPU of `arch`, and a launch only calls `on_launch`.

    arch: a key of the launch tables, such as "sm_90". Meta tensors take no memory; tensors on the
    CPU keep whatever values they had, since no kernel writes to them. It holds for all threads of
    the process.
    """
    global _pretence
    before = _pretence
    _pretence = _Pretence(arch, on_launch)
    try:
        yield
    finally:
        _pretence = before


def pretending() -> bool:
    """Whether the caller is inside `pretend`."""
    return _pretence is not None


def pretence() -> Hashable:
    """Which `pretend` the caller is inside, None for none."""
    return _pretence


def constant(tensor: Tensor) -> Tensor:
    """Marks a tensor that lives on and has the same values at the beginning of each launch.

    Launch plans (`fluxfast.model.launch_plans`) may keep such a tensor, and no other one. Returns
    it.
    """
    tensor.fluxfast_constant = True  # type: ignore[attr-defined]
    return tensor


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor was marked so."""
    return getattr(tensor, "fluxfast_constant", False)


@dataclass(frozen=True)
class Addresses:
    """An argument of a kernel that is a table of the addresses of tensors, on the device.

    table: gives the table for the tensors' addresses, in their order.
    """

    table: Callable[[tuple[int, ...]], Tensor]
    tensors: tuple[Tensor, ...]

    def made(self) -> Tensor:
        return self.table(tuple([t.data_ptr() for t in self.tensors]))


@dataclass(frozen=True)
class Launched:
    """One launch: what `launch` was called with, and what Triton compiled for it.

    compiled: None in the interpreter, and inside `pretend`, where a repetition calls on_launch.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    numbers: Mapping[str, Any]
    compiled: Any
    on_launch: OnLaunch | None


@dataclass(frozen=True)
class Compared:
    """What a launcher found when it compared the addresses of tensors, and then went by."""

    holds: Callable[..., bool]
    tensors: tuple[Tensor, ...]
    found: bool


# who hears of this thread's launches, under the name `hear`
_thread = threading.local()


@contextlib.contextmanager
def hearing(hear: Callable[[Launched | Compared], None]) -> Iterator[None]:
    """Inside, `hear` is told of each launch of this thread, after it.

    It is told as well of each comparison of addresses by which a launch was chosen.
    """
    before = getattr(_thread, "hear", None)
    _thread.hear = hear
    try:
        yield
    finally:
        _thread.hear = before


def compare(holds: Callable[..., bool], *tensors: Tensor) -> bool:
    """What `holds` says to the addresses of the tensors."""
    found = holds(*[t.data_ptr() for t in tensors])
    if (hear := getattr(_thread, "hear", None)) is not None:
        hear(Compared(holds, tensors, found))
    return found


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **numbers: Any) -> None:
    """Launches `kernel` on the GPU that its tensors are on; inside `pretend`, nothing runs."""
    compiled = on_launch = None
    given = [arg.made() if isinstance(arg, Addresses) else arg for arg in args]
    if _pretence is not None:
        on_launch = _pretence.on_launch
        on_launch(kernel, tuple(given), numbers)
    else:
        tensor = next(arg for arg in given if isinstance(arg, Tensor))
        with on_device(tensor):
            compiled = kernel[grid](*given, **numbers)
    if (hear := getattr(_thread, "hear", None)) is not None:
        hear(Launched(kernel, grid, args, numbers, compiled, on_launch))
