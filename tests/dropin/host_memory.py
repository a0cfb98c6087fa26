"""The ways in which trainers save memory, in plain torch on one device.

Written from what each does to a block: weights that are "away" are gone from where they were, and
what was there holds something else. Each says in its docstring whose way it stands for.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class BlockSwap:
    """sd-scripts' and musubi-tuner's: two blocks trade places after each block's forward.

    The block that comes takes the memory of the one that goes, and hooks on the blocks' backward
    trade them back.
    """

    def __init__(self, blocks, swapped):
        self.blocks, self.swapped, self.trades = blocks, swapped, 0
        self.away = {}
        self.first_away = len(blocks) - swapped
        for block in blocks[self.first_away :]:
            for module in self.held(block):
                self.away[module] = module.weight.data
                module.weight.data = torch.full_like(module.weight.float(), float("nan")).to(
                    module.weight.dtype
                )
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, i=i: self.after_forward(i))
            block.register_full_backward_hook(lambda *_, i=i: self.after_backward(i))

    @staticmethod
    def held(block):
        # a LoRA's own modules stay, as those of sd-scripts do, which are no part of the block
        return [m for m in block.modules() if type(m) is nn.Linear and not m.weight.requires_grad]

    def trade(self, goes, comes):
        self.trades += 1
        for going, coming in zip(
            self.held(self.blocks[goes]), self.held(self.blocks[comes]), strict=True
        ):
            memory = going.weight.data
            self.away[going] = memory.clone()
            going.weight.data = self.away[going]
            memory.copy_(self.away.pop(coming))
            coming.weight.data = memory

    def after_forward(self, i):
        if i < self.swapped:
            self.trade(i, self.first_away + i)

    def after_backward(self, i):
        # a hook may run before its block's backward, but then the one behind it is done
        done = len(self.blocks) - 1 - i
        if 0 < done <= self.swapped:
            self.trade(i + 1, self.swapped - done)


class Conductor:
    """OneTrainer's: a layer's weights are here while the layer runs, forward or again in backward.

    They come to new memory each time, and what they leave is overwritten.
    """

    def __init__(self, layers):
        self.homes = {layer: self.tensors(layer) for layer in layers}
        for layer in layers:
            self.send_away(layer)

    @staticmethod
    def tensors(layer):
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        held = [m.weight for m in linears] + [m.bias for m in linears if m.bias is not None]
        return {t: t.data.clone() for t in held if not t.requires_grad}

    def bring(self, layer):
        for tensor, value in self.homes[layer].items():
            tensor.data = value.clone()

    def send_away(self, layer):
        for tensor in self.homes[layer]:
            tensor.data.zero_()
            tensor.data = torch.zeros_like(tensor.data)


class CheckpointLayer(nn.Module):
    """OneTrainer's: it replaces a block's forward by its own, which keeps the one from before."""

    def __init__(self, block, reentrant, conductor=None):
        super().__init__()
        # in a list, so that the block is no part of it
        self.block, self.conductor, self.reentrant = [block], conductor, reentrant
        self.dummy = torch.zeros(1, requires_grad=True)
        self.orig_forward = block.forward
        block.forward = self.forward

    def _run(self, dummy, *args):
        if self.conductor is None:
            return self.orig_forward(*args)
        # the weights of a layer whose backward comes next stay until the next layer's forward
        for other in self.conductor.homes:
            self.conductor.send_away(other)
        self.conductor.bring(self.block[0])
        return self.orig_forward(*args)

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            given = (self.dummy, *args, *kwargs.values())
            return checkpoint(self._run, *given, use_reentrant=self.reentrant)
        return self._run(self.dummy, *args, *kwargs.values())


class Bouncing(torch.autograd.Function):
    """A product with a weight that is fetched for each direction by itself."""

    @staticmethod
    def forward(ctx, x, fetch, bias):
        ctx.fetch = fetch
        return nn.functional.linear(x, fetch(), bias)

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.fetch(), None, None


def bounce(linear):
    """ai-toolkit's: the linear's forward fetches the weight, whose parameter holds none here."""
    kept = linear.weight.data.clone()
    linear.weight.data.fill_(float("nan"))

    def forward(x):
        return Bouncing.apply(x, lambda: kept.to(x.dtype), linear.bias)

    linear.forward, linear._layer_memory_manager = forward, object()


def cpu_offloading(forward):
    """sd-scripts' checkpoint whose inputs and outputs wait in host memory."""

    def moved(*inputs):
        outs = forward(*(x.to("cpu") if isinstance(x, torch.Tensor) else x for x in inputs))
        return outs.to("cpu") if isinstance(outs, torch.Tensor) else tuple(o.cpu() for o in outs)

    return lambda *inputs: checkpoint(moved, *inputs, use_reentrant=False)
