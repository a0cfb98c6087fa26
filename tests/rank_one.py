"""A whole adapter kind in one file, as a new one comes in: y becomes y + (x · u) v.

u [in] starts at random and v [out] at zero; both are trained.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fluxfast.adapters.kind import AdapterKind, Wrapped, wrap_linears


class RankOne(NamedTuple):
    """What it adds to a product, after `fluxfast.ops.linear.adapters.Adapter`."""

    u: Tensor
    v: Tensor
    dropout: float = 0.0

    @property
    def tensors(self):
        return self.u, self.v

    def with_tensors(self, tensors):
        return RankOne(*tensors)

    def add_to(self, y, x):
        y += torch.outer(x @ self.u.to(x.dtype), self.v.to(x.dtype))

    def backward(self, dy, x, dx):
        u, ds = self.u.to(x.dtype), dy @ self.v.to(x.dtype)
        if dx is not None:
            dx += torch.outer(ds, u)
        return ds @ x, (x @ u) @ dy


class RankOneLinear(nn.Module):
    def __init__(self, base_layer, dtype):
        super().__init__()
        self.base_layer, self.enabled = base_layer, True
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.u = nn.Parameter(torch.randn(self.in_features).to(dtype))
        self.v = nn.Parameter(torch.zeros(self.out_features, dtype=dtype))

    def forward(self, x):
        y = self.base_layer(x)
        return y + (x @ self.u.to(x.dtype))[..., None] * self.v.to(x.dtype) if self.enabled else y


class RankOneKind(AdapterKind):
    label = "rank-one"

    def shapes(self, out_features, in_features, rank):
        return {"u": (in_features,), "v": (out_features,)}

    def tensors(self, module):
        return {"u": module.u, "v": module.v}

    def add(self, transformer, settings):
        names = settings.modules(transformer)
        wrap_linears(transformer, names, lambda linear: RankOneLinear(linear, settings.dtype))

    def modules(self, transformer):
        return {n: m for n, m in transformer.named_modules() if isinstance(m, RankOneLinear)}

    def set_enabled(self, transformer, enabled):
        for module in self.modules(transformer).values():
            module.enabled = enabled

    def read(self, module, *, share_dropout):
        if not isinstance(module, RankOneLinear):
            return None
        return Wrapped(module.base_layer, (RankOne(module.u, module.v),) if module.enabled else ())
