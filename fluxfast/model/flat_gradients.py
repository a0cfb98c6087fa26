"""The gradients of all that trains, in one buffer for each dtype.

autograd hands out gradients one tensor at a time: 836 of them for FLUX.1, which then are added up
over micro-batches, clipped, and given to the optimiser one by one. With `FlatGradients`, a fused
block's backward writes the gradients of its LoRAs to their places in a buffer, and autograd hears
nothing of them. What follows are a few launches on whole buffers:

    gradients = FlatGradients(transformer, accumulates=...)
    for each micro-batch:
        loss.backward()
        gradients.take()
    gradients.hand_over()
    clip gradients.buffers; optimizer.step(); optimizer.zero_grad(set_to_none=True)

All gradients that one launch makes lie side by side: dA of the LoRAs of linears that share their
input, and dB of these linears (`ops.linear.grad_places`).

What trains elsewhere, in a block that does not run fused, by an adapter of another kind, or with a
hook on it, gets its gradient from autograd as ever, and `take` copies it to its place.

This is for one who owns the training loop. With it, `torch.autograd.grad` finds no gradient of the
LoRAs of fused blocks, and hooks that are put on them later are not called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxfast.model.block_call import BlockLinears
from fluxfast.model.tape import adapter_tensors, read_linears
from fluxfast.ops.linear.adapters import Lora

# what each place to which a launch writes is aligned to, in bytes: the widest access of a kernel
_ALIGNED = 16


class GradientPlaces:
    """Some of a model's trained tensors, and the place of each one's gradient.

    Those of a fused block are in the order of its `adapter_tensors`.
    """

    def __init__(self, trained: Sequence[Tensor], places: dict[Tensor, Tensor]) -> None:
        self.trained = list(trained)
        self.places = [places[t] for t in trained]
        # where each place begins, in elements behind the first; None: in other memory. Places of
        # the same shapes and layout lie side by side alike
        first = self.places[0]
        self.layout: tuple[Any, ...] = tuple(
            place.storage_offset() - first.storage_offset()
            if place.untyped_storage()._cdata == first.untyped_storage()._cdata
            else None
            for place in self.places
        )
        # whether a fused block's backward has written to the places since `take`
        self.written = False
        # which of the tensors have had a gradient since `hand_over`
        self.present = [False] * len(trained)

    def are_of(self, trained: Sequence[Tensor]) -> bool:
        """Whether a call's `adapter_tensors` are those of these places, and train."""
        return len(trained) == len(self.trained) and all(
            t is own and t.requires_grad for t, own in zip(trained, self.trained, strict=True)
        )

    def to_write(self) -> list[Tensor]:
        """Where a backward writes: to the places, unless they hold gradients that must stay."""
        return [torch.empty_like(p) for p in self.places] if self.written else self.places

    def layout_of(self, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        """`layout`, or that of other memory which `to_write` gave."""
        return self.layout if grads is self.places else ()

    def wrote(self, grads: Sequence[Tensor]) -> None:
        """A backward has written to what `to_write` gave it."""
        if grads is not self.places:
            torch._foreach_add_(self.places, list(grads))
        self.written = True

    def take(self) -> None:
        """Makes the places hold the micro-batch's gradients, those of autograd among them."""
        grads = [t.grad for t in self.trained]
        given = [grad is not None for grad in grads]
        if any(given):
            own = [place for place, there in zip(self.places, given, strict=True) if there]
            others = [grad for grad in grads if grad is not None]
            (torch._foreach_add_ if self.written else torch._foreach_copy_)(own, others)
            for tensor in self.trained:
                tensor.grad = None
        if self.written:
            given = [True] * len(given)
        elif not all(given):
            absent = [place for place, there in zip(self.places, given, strict=True) if not there]
            torch._foreach_zero_(absent)
        self.present = [there or before for there, before in zip(given, self.present, strict=True)]
        self.written = False


class FlatGradients:
    """The gradients of a transformer's trained parameters.

    It puts itself on the transformer and on its blocks, for good. accumulates: whether a step adds
    up several micro-batches, which takes a second buffer.
    """

    def __init__(self, transformer: Any, *, accumulates: bool = False) -> None:
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        of_blocks, left = [], dict.fromkeys(parameters)
        for block in transformer.blocks:
            runs = _runs(block, left)
            of_blocks.append((block, runs))
            for tensor in (t for run in runs for t in run):
                del left[tensor]
        order = [run for _, runs in of_blocks for run in runs] + [[p] for p in left]
        # where backward writes; and what `hand_over` gives to parameters
        self.of_micro_batch, places = _laid_out(order)
        self.buffers, self._handed_over = self.of_micro_batch, places
        if accumulates:
            self.buffers, self._handed_over = _laid_out(order)
        self._is_first = True
        self._all = [GradientPlaces(list(left), places)] if left else []
        for block, runs in of_blocks:
            block.gradients = None
            if runs:
                own = adapter_tensors(_linears(block))
                block.gradients = GradientPlaces(own, places)
                self._all.append(block.gradients)
        transformer.gradients = self

    def take(self) -> None:
        """Takes what one backward pass has left: the gradients of a micro-batch."""
        for each in self._all:
            each.take()
        if self.buffers is self.of_micro_batch:
            assert self._is_first, "several micro-batches need FlatGradients(accumulates=True)"
        for total, new in zip(self.buffers, self.of_micro_batch, strict=True):
            if total is not new:
                total.copy_(new) if self._is_first else total.add_(new)
        self._is_first = False

    def hand_over(self) -> None:
        """Makes each parameter's `.grad` its part of `buffers`.

        It stays None where no micro-batch had a gradient for the parameter.
        """
        for each in self._all:
            for tensor, present in zip(each.trained, each.present, strict=True):
                tensor.grad = self._handed_over[tensor] if present else None
            each.present = [False] * len(each.present)
        self._is_first = True

    # what replays a captured backward pass, and so runs no block's Python, says of it

    @property
    def written(self) -> list[bool]:
        """Which places fused blocks have written to since `take` or `forget`."""
        return [each.written for each in self._all]

    def replayed(self, written: Sequence[bool]) -> None:
        """A replay writes, or has written, to the places that `written` was said of."""
        for each, by_replay in zip(self._all, written, strict=True):
            each.written = by_replay

    def forget(self) -> None:
        """Nothing has been written: the next backward pass is the first of a micro-batch."""
        self.replayed([False] * len(self._all))


def _linears(block: Any) -> BlockLinears:
    linears = read_linears(block.linear_groups(), share_dropout=block.share_dropout)
    return [] if isinstance(linears, str) else linears


def _runs(block: Any, free: Iterable[Tensor]) -> list[list[Tensor]]:
    """The trained tensors of a block, in lists of those whose gradients one launch makes.

    None of them where its backward can't write all of their gradients: it has adapters of another
    kind than LoRA, or with weight decomposition, or some of their tensors don't train, have hooks,
    or have a place in `free` no more.
    """
    runs = []
    for group in _linears(block):
        loras = [adapter for p in group for adapter in p.adapters]
        if not all(isinstance(lora, Lora) and lora.magnitude is None for lora in loras):
            return []
        runs += [[lora.tensors[i] for lora in loras] for i in (0, 1) if loras]
    tensors = [t for run in runs for t in run]
    known = set(free)
    distinct = len(set(tensors)) == len(tensors)
    return runs if distinct and all(t in known and not _has_hooks(t) for t in tensors) else []


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _laid_out(runs: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], dict[Tensor, Tensor]]:
    """Zeros for each run of tensors, one buffer for each dtype, and each tensor's own place."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    starts = {}
    for run in runs:
        for i, tensor in enumerate(run):
            kind = (tensor.dtype, tensor.device)
            start = sizes.get(kind, 0)
            if i == 0:
                unit = max(_ALIGNED // tensor.itemsize, 1)
                start = -(-start // unit) * unit
            starts[tensor] = (kind, start)
            sizes[kind] = start + tensor.numel()
    buffers = {
        kind: torch.zeros(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()
    }
    return list(buffers.values()), {
        tensor: buffers[kind][start : start + tensor.numel()].view(tensor.shape)
        for tensor, (kind, start) in starts.items()
    }
