"""How a fused block's Function runs its two directions.

A block writes each direction as a pure function of tensors and of what does not change from call to
call:

    forward(block, call, linears, inputs) -> outs, kept
    backward(block, call, linears, inputs, kept, douts, needs) -> gradients of inputs, of adapters

inputs: the block's streams and their modulation. kept: tensors in tuples, lists and dicts. needs:
for each input, whether its gradient is wanted. Neither may keep anything elsewhere, let a tensor's
values decide what is computed, or write to its arguments, but for the places that linears name for
gradients (`FlatGradients`) and the adapters' copies beside the weights (`BlockCall.filled_groups`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fluxfast.model import launch_plans
from fluxfast.model.block_call import BlockCall, BlockLinears
from fluxfast.model.flat_gradients import GradientPlaces
from fluxfast.model.launch_plans import Surroundings, surroundings
from fluxfast.model.nested import flattened, nested
from fluxfast.model.residency import residency_of, resident
from fluxfast.model.tape import (
    Grads,
    Kept,
    adapter_grads,
    adapter_tensors,
    linears_again,
    read_moved,
    save,
    saved,
)

Forward = Callable[[Any, BlockCall, BlockLinears, Sequence[Tensor]], tuple[Any, Any]]
Backward = Callable[..., tuple[Sequence[Tensor | None], Sequence[Grads]]]


def run_forward(
    ctx: Any,
    forward: Forward,
    block: Any,
    call: BlockCall,
    linears: BlockLinears,
    gradients: GradientPlaces | None,
    *tensors: Tensor,
) -> Any:
    """A Function's forward.

    gradients: where backward writes the gradients of the adapters; None: it returns them. tensors:
    the inputs, and those of the `adapter_tensors` of linears that autograd is to know of: all of
    them, or the first alone where backward writes their gradients itself.
    """
    trained = adapter_tensors(linears)
    inputs = tensors[: -1 if gradients is not None else len(tensors) - len(trained)]

    def direction(block: Any) -> launch_plans.Made:
        outs, kept = forward(block, call, linears, inputs)
        made: list[Tensor | None] = []
        outs_form = flattened(outs, made)
        leaves, kept_form = Kept.of(kept)
        return [*made, *leaves], (len(made), outs_form, kept_form)

    usable = launch_plans.usable(block.launch_plans, call, inputs[0])
    known = launch_plans.operands(call, linears) if usable else None
    beside = surroundings(call, linears, backward=False)
    if known is None:
        made, forms = direction(block)
    else:
        made, forms = block.launch_plans.run(
            direction, block, forward, known, beside, (*trained, *inputs)
        )
    ctx.filled_by = _note(beside)
    split, outs_form, kept_form = forms
    kept = Kept(made[split:], kept_form)
    ctx.gradients = gradients
    ctx.operands = None if residency_of(block) is not None else known
    save(ctx, block, call, linears, inputs, trained, kept)
    return nested(outs_form, made)


def _note(beside: Surroundings) -> object:
    """Marks the augmented weights of a block as filled by the call that has the returned mark."""
    mark = object()
    for place in beside.places:
        place.layout.holds = mark
    return mark


def run_backward(
    ctx: Any, backward: Backward, douts: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """A Function's backward: the gradients of all its arguments."""
    inputs, trained, kept = saved(ctx)
    # the Function's first four arguments are block, call, linears and gradients
    needs = ctx.needs_input_grad[4 : 4 + len(inputs)]
    block, call, gradients = ctx.block, ctx.call, ctx.gradients
    places = [] if gradients is None else gradients.to_write()
    with resident(block, "backward"):
        read_moved(ctx)
        operands = ctx.operands
        read = functools.cache(lambda: linears_again(ctx, trained, places))
        beside = surroundings(call, ctx.linears or read(), backward=True)
        # autograd forbids that an adapter changes between forward and backward, but another
        # adapter's forward may have come in between
        filled = all(place.layout.holds is ctx.filled_by for place in beside.places)
        call = call.but(filled=filled)

        def direction(block: Any) -> launch_plans.Made:
            linears = read()
            found, grads = backward(block, call, linears, inputs, kept.values, douts, needs)
            return [*found, *(() if places else adapter_grads(grads))], None

        usable = launch_plans.usable(block.launch_plans, call, inputs[0])
        if operands is None and usable:
            operands = launch_plans.operands(call, read())
        if operands is None or not usable:
            made, _ = direction(block)
        else:
            fixed = (backward, needs, filled, gradients and gradients.layout_of(places))
            others = (*trained, *inputs, *kept.leaves, *douts)
            made, _ = block.launch_plans.run(
                direction, block, fixed, operands, beside, others, places
            )
    if gradients is None:
        return (None, None, None, None, *made)
    gradients.wrote(places)
    return (None, None, None, None, *made, None)
