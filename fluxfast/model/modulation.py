"""Modulation ahead: the CPU computes shifts, scales and gates of all blocks before they run.

A quarter of FLUX.1's weights are multiplied by one vector a sample, vec = f(timestep, guidance,
pooled prompt), which is known before a step starts. So these linears (`linear_names`) stay in host
memory, in the format that they are stored in, and take no memory of the device. A thread computes
the next step's vectors from them while the device works on this step. Their modules stay in their
places in the model, so that names, state dict and `save_pretrained` do not change; `.to(device)`
leaves them on the host, and `.to(dtype)` casts them.

Sums are in fp32 whatever the weights are stored in, and the vectors are rounded once, to the
activations' dtype. Nothing here has a gradient, so an adapter on one of these linears, or a base
that trains, is refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fluxfast.model.linear import LinearParams, obstacle, project, read_linear
from fluxfast.model.pinned import pin, send
from fluxfast.ops.device import usable_cores
from fluxfast.quant.gemv import gemv, gemv_each
from fluxfast.quant.linear import QuantLinear

# the modulation linears of a double block (image, text) and of a single one
_DOUBLE, _SINGLE = ("norm1.linear", "norm1_context.linear"), ("norm.linear",)
# their names inside a block; who streams blocks leaves them out
BLOCK_LINEARS = (*_DOUBLE, *_SINGLE)
# the most batches that are prepared but not used yet: the next one, and the one after it
_AHEAD = 2

# the vectors of one block, each [B, n · D]: (image's, text's), or (the joint sequence's,)
Vectors = tuple[Tensor, ...]


class Conditions(NamedTuple):
    """What modulation is a function of.

    timestep and guidance [B], times 1000 as the embedder takes them (guidance None where the model
    takes none), and the pooled prompts [B, P].
    """

    timestep: Tensor
    guidance: Tensor | None
    pooled: Tensor

    @classmethod
    def of(
        cls, timestep: Tensor, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype
    ) -> Conditions:
        """From a forward's own arguments; dtype: that of its hidden_states."""
        # diffusers rounds both to that dtype; so do we, and a bf16 caller gets the same embedding
        return cls(
            timestep.to(dtype) * 1000,
            None if guidance is None else guidance.to(dtype) * 1000,
            pooled,
        )

    def on_host(self) -> Conditions:
        """The same on the CPU, in fp32, or in fp64 where they are."""
        return Conditions(*(None if x is None else _to_host(x) for x in self))  # type: ignore[arg-type]

    def equals(self, other: Conditions) -> bool:
        """Whether the values of two that are on the host are all equal."""
        if (self.guidance is None) != (other.guidance is None):
            return False
        return all(
            torch.equal(a, b)
            for a, b in zip(self, other, strict=True)
            if a is not None and b is not None
        )


def _to_host(x: Tensor) -> Tensor:
    return x.detach().cpu().to(torch.promote_types(x.dtype, torch.float32))


def embed(
    embedder: Any,
    conditions: Conditions,
    dtype: torch.dtype,
    linear: Callable[[Tensor, nn.Module], Tensor] = project,
) -> Tensor:
    """vec [B, D], in `dtype`, by a transformer's `time_text_embed`.

    linear: applies one of its linears to a tensor.
    """

    def mlp(module: Any, x: Tensor) -> Tensor:
        return linear(silu(linear(x.to(dtype), module.linear_1)), module.linear_2)

    vec = mlp(embedder.timestep_embedder, embedder.time_proj(conditions.timestep))
    if conditions.guidance is not None:
        vec = vec + mlp(embedder.guidance_embedder, embedder.time_proj(conditions.guidance))
    return vec + mlp(embedder.text_embedder, conditions.pooled)


def linear_names(config: Mapping[str, Any]) -> list[str]:
    """The full names of the linears that stay on the host, for a transformer's config."""
    embedders = [
        "timestep_embedder",
        *(["guidance_embedder"] if config.get("guidance_embeds") else []),
        "text_embedder",
    ]
    names = [
        f"time_text_embed.{embedder}.{linear}"
        for embedder in embedders
        for linear in ("linear_1", "linear_2")
    ]
    names += [
        f"transformer_blocks.{i}.{linear}"
        for i in range(config.get("num_layers", 19))
        for linear in _DOUBLE
    ]
    single = range(config.get("num_single_layers", 38))
    names += [f"single_transformer_blocks.{i}.{linear}" for i in single for linear in _SINGLE]
    return [*names, "norm_out.linear"]


def why_not(transformer: nn.Module) -> str | None:
    """Why a transformer's modulation can't be computed ahead; None where it can.

    Names the first linear that prevents it.
    """
    for name in linear_names(transformer.config):  # type: ignore[arg-type]
        reason = _obstacle(transformer.get_submodule(name))
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _obstacle(module: nn.Module) -> str | None:
    params = read_linear(module)
    if params is None:
        return obstacle(module)
    if params.adapters:
        return "an adapter is on it"
    base = getattr(module, "base_layer", module)
    return (
        None
        if isinstance(base, QuantLinear) or type(base) is nn.Linear
        else f"{type(base).__name__} is not known"
    )


def _params(module: nn.Module) -> LinearParams:
    if (reason := _obstacle(module)) is not None:
        raise ValueError(
            f"modulation is computed ahead, on the host, but a linear of it can't be: {reason}"
        )
    params = read_linear(module)
    assert params is not None
    return params


def apply_on_host(x: Tensor, module: nn.Module, *, threads: int | None = None) -> Tensor:
    """A linear without adapters, on the CPU: x [B, in] to [B, out], both in fp32 or fp64.

    Raises ValueError for a linear that can't be computed ahead.
    """
    weight, bias, _ = _params(module)
    y = gemv(x, weight, threads=threads)  # type: ignore[arg-type]
    return y if bias is None else y.add_(bias)


def apply_each_on_host(
    x: Tensor, modules: Sequence[nn.Module], outs: Sequence[Tensor], *, threads: int | None = None
) -> None:
    """`apply_on_host` of x to each linear, written to `outs`.

    It is few calls, because after each one this thread waits until the one that launches kernels
    lets go of Python's lock.
    """
    params = [_params(module) for module in modules]
    weights: list[Any] = [p.weight for p in params]
    gemv_each(x, weights, outs, threads=threads)
    biases = [(out, p.bias) for out, p in zip(outs, params, strict=True) if p.bias is not None]
    if biases:
        torch._foreach_add_(*map(list, zip(*biases, strict=True)))


def _threads_beside(device: torch.device) -> int:
    """The number of threads for modulation: torch's.

    Beside a GPU, two cores stay free where there are more: one launches its kernels, one reads
    data.
    """
    threads = torch.get_num_threads()
    return threads if device.type != "cuda" else max(1, min(threads, usable_cores() - 2))


class _Prepared(NamedTuple):
    conditions: Conditions
    vectors: Tensor


class ModulationAhead:
    """The modulation of one transformer. `FluxTransformer.set_modulation_ahead` makes it.

    The weights must not change between `prepare` and the forward that it prepares.
    """

    def __init__(self, transformer: Any) -> None:
        """Moves the linears to host memory.

        Raises ValueError, before it moves anything, where `why_not` gives a reason.
        """
        reason = why_not(transformer)
        if reason is not None:
            raise ValueError(f"modulation can't be computed ahead: {reason}")
        self._embedder = transformer.time_text_embed
        # the modules that hold the linears, since an adapter that comes later replaces a linear
        self._blocks: list[list[Any]] = [
            [b.norm1, b.norm1_context] for b in transformer.transformer_blocks
        ]
        self._blocks += [[b.norm] for b in transformer.single_transformer_blocks]
        self._blocks.append([transformer.norm_out])
        # how many numbers a sample has in all blocks together
        self._width = sum(linear.out_features for linears in self._linears() for linear in linears)
        self._move(torch.device("cpu"))
        self._begin()

    def _begin(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[_Prepared]] = deque()
        self._last: _Prepared | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy has its own thread, and nothing prepared
        return {name: self.__dict__[name] for name in ("_embedder", "_blocks", "_width")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the weights take."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _owned(self) -> Iterator[nn.Module]:
        yield self._embedder
        for owners in self._blocks:
            for owner in owners:
                yield owner.linear

    def _tensors(self) -> Iterator[Tensor]:
        for module in self._owned():
            yield from module.parameters()
            yield from module.buffers()

    def _move(self, device: torch.device) -> None:
        for module in self._owned():
            if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
                module.to(device)

    # before the forward

    def prepare(
        self, conditions: Callable[[], Conditions], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Compute a forward's vectors in a thread, which also calls `conditions`.

        An error there is raised by the next `flat_vectors`. Prepare in the order of the forwards;
        at most two are kept.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="fluxfast-modulation")
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().cancel()

        def compute() -> _Prepared:
            known = conditions().on_host()
            return _Prepared(known, self._compute(known, device, dtype))

        self._pending.append(self._pool.submit(compute))

    def forget(self) -> None:
        """Drop what has been prepared, and let the thread end."""
        self._pending.clear()
        self._last = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    # in the forward

    @torch.compiler.disable
    def flat_vectors(
        self, conditions: Conditions, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """The vectors of all blocks and of norm_out as one tensor, on the device in `dtype`.

        `views` splits it. Vectors that were prepared for equal conditions are used; otherwise they
        are computed here, to the same values.
        """
        batch = conditions.timestep.shape[0]
        if conditions.timestep.is_meta:
            return torch.empty(batch * self._width, dtype=dtype, device=device)
        conditions = conditions.on_host()
        flat = self._look_up(conditions)
        if flat is None or flat.dtype != dtype:
            flat = self._compute(conditions, device, dtype)
        # one copy for all blocks; only the device's queue waits for it
        return send(flat, device)

    def _look_up(self, conditions: Conditions) -> Tensor | None:
        if self._last is not None and self._last.conditions.equals(conditions):
            # a second forward of the same step
            return self._last.vectors
        for passed, future in enumerate(self._pending):
            if (error := future.exception()) is not None:
                self._pending.clear()
                raise error
            prepared = future.result()
            if prepared.conditions.equals(conditions):
                self._last = prepared
                for _ in range(passed + 1):
                    self._pending.popleft()
                return prepared.vectors
        return None

    def _linears(self) -> list[list[Any]]:
        return [[owner.linear for owner in owners] for owners in self._blocks]

    def views(self, flat: Tensor, batch: int) -> list[Vectors]:
        """A tuple of vectors for each block, in order, then one for norm_out.

        Each vector is one linear's output [B, out], contiguous.
        """
        blocks = [
            [batch * linear.out_features for linear in linears] for linears in self._linears()
        ]
        parts = iter(flat.split([size for sizes in blocks for size in sizes]))
        return [tuple(next(parts).view(batch, -1) for _ in sizes) for sizes in blocks]

    @torch.no_grad()
    def _compute(self, conditions: Conditions, device: torch.device, dtype: torch.dtype) -> Tensor:
        """All vectors as one tensor on the host, in memory that `device` can read by itself."""
        wide = torch.promote_types(dtype, torch.float32)
        batch = conditions.timestep.shape[0]
        apply = partial(apply_on_host, threads=_threads_beside(device))
        vec = silu(embed(self._embedder, conditions, wide, apply))
        flat = torch.empty(batch * self._width, dtype=wide)
        modules = [linear for linears in self._linears() for linear in linears]
        outs = [out for vectors in self.views(flat, batch) for out in vectors]
        apply_each_on_host(vec, modules, outs, threads=_threads_beside(device))
        return pin(flat.to(dtype), device)

    def seconds(self, batch: int, device: torch.device, dtype: torch.dtype) -> float:
        """How long the host takes for the vectors of a batch, measured on made-up conditions."""
        pooled = torch.zeros(batch, self._embedder.text_embedder.linear_1.in_features)
        guidance = torch.ones(batch) if hasattr(self._embedder, "guidance_embedder") else None
        conditions = Conditions(torch.full((batch,), 500.0), guidance, pooled)
        times = []
        # the first time may have to read the weights from disk
        for _ in range(3):
            begun = time.perf_counter()
            self._compute(conditions, device, dtype)
            times.append(time.perf_counter() - begun)
        return min(times)

    # moves by others

    def staying(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`fn`, which `Module._apply` takes, with these tensors cast by it but left on the host."""
        here = {tensor.data_ptr() for tensor in self._tensors() if tensor.is_cpu}

        def unless_here(tensor: Tensor) -> Tensor:
            if not tensor.is_cpu or tensor.data_ptr() not in here:
                return fn(tensor)
            return tensor.to(fn(torch.empty(0, dtype=tensor.dtype)).dtype)

        return unless_here

    def release(self, device: torch.device) -> None:
        """Bring the linears to the device, with whatever adapters are on them."""
        self.forget()
        self._move(device)
