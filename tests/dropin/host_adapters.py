"""Adapter modules with the interfaces of other trainers, in plain torch.

Written from their attributes and arithmetic: each replaces the forward of a linear, and says in
its docstring whose module it stands for.
"""

import weakref
from itertools import accumulate

import torch
from dropin_hosts import randomise_trained
from torch import nn
from torch.nn import functional as F


def plain(columns, rows):
    return nn.Linear(columns, rows, bias=False)


class KohyaLora(nn.Module):
    """sd-scripts' and musubi-tuner's `LoRAModule`."""

    def __init__(self, linear, rank=3, split_dims=None, dropout=None):
        super().__init__()
        k, n = linear.in_features, linear.out_features
        if split_dims is None:
            self.lora_down, self.lora_up = plain(k, rank), plain(rank, n)
        else:
            self.lora_down = nn.ModuleList(plain(k, rank) for _ in split_dims)
            self.lora_up = nn.ModuleList(plain(rank, part) for part in split_dims)
        self.lora_dim, self.split_dims, self.scale, self.multiplier = rank, split_dims, 0.5, 1.2
        self.dropout, self.rank_dropout, self.module_dropout = dropout, None, None
        self.org_forward = linear.forward
        linear.forward = self.forward

    def forward(self, x):
        before = self.org_forward(x)
        is_split = self.split_dims is not None
        downs, ups = (each if is_split else [each] for each in (self.lora_down, self.lora_up))
        inner = [lora_down(x) for lora_down in downs]
        if self.dropout is not None and self.training:
            inner = [F.dropout(each, self.dropout) for each in inner]
        added = [lora_up(each) for lora_up, each in zip(ups, inner, strict=True)]
        return before + torch.cat(added, -1) * self.multiplier * self.scale


class KohyaInference(KohyaLora):
    """sd-scripts' `LoRAInfModule`, which has a switch and no dropout."""

    enabled = True

    def default_forward(self, x):
        added = self.lora_up(self.lora_down(x))
        return self.org_forward(x) + added * self.multiplier * self.scale

    def forward(self, x):
        return self.default_forward(x) if self.enabled else self.org_forward(x)


class MusubiLora(KohyaLora):
    """musubi-tuner's `LoRAModule` in a later version, which casts x and what it returns."""

    def _autocast_enabled_for(self, x):
        try:
            return torch.is_autocast_enabled(x.device.type)
        except TypeError:
            return torch.is_autocast_enabled()

    def _lora_input(self, x):
        wanted = self.lora_down.weight.dtype
        casts = x.is_floating_point() and not self._autocast_enabled_for(x)
        return x.to(wanted) if casts else x

    def _match_org_dtype(self, value, org_forwarded):
        return value.to(org_forwarded.dtype)

    def forward(self, x):
        before = self.org_forward(x)
        added = self.lora_up(self.lora_down(self._lora_input(x))) * self.multiplier * self.scale
        return self._match_org_dtype(before + added, before)


class MusubiLoha(nn.Module):
    """musubi-tuner's `LoHaModule`."""

    def __init__(self, linear, rank=3, rank_dropout=None):
        super().__init__()
        self.create_layer(linear, rank)
        self.lora_dim, self.scale, self.multiplier = rank, 0.5, 1.2
        self.dropout, self.rank_dropout, self.module_dropout = None, rank_dropout, None
        self.org_forward = linear.forward
        linear.forward = self.forward

    def create_layer(self, linear, rank):
        for name in ("hada_w1", "hada_w2"):
            a, b = plain(rank, linear.out_features), plain(linear.in_features, rank)
            self.register_parameter(f"{name}_a", a.weight)
            self.register_parameter(f"{name}_b", b.weight)

    def get_diff_weight(self):
        first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return first * second * torch.tensor(self.scale)

    def forward(self, x):
        before = self.org_forward(x)
        change = self.get_diff_weight()
        if self.rank_dropout is not None and self.training:
            change = change * (torch.rand(len(change), 1) > self.rank_dropout)
        return before + F.linear(x, change) * self.multiplier


class MusubiLokr(MusubiLoha):
    """musubi-tuner's `LoKrModule`, its second factor in two narrow ones."""

    use_w2 = False

    def create_layer(self, linear, rank):
        k, n = linear.in_features // 4, linear.out_features // 4
        self.lokr_w1 = nn.Parameter(torch.empty(4, 4))
        self.lokr_w2_a = nn.Parameter(torch.empty(n, rank))
        self.lokr_w2_b = nn.Parameter(torch.empty(rank, k))

    def get_diff_weight(self):
        return make_kron(self.lokr_w1, self.lokr_w2_a @ self.lokr_w2_b, self.scale)


def make_kron(w1, w2, scale):
    return torch.kron(w1, w2) * scale


class Network:
    """What ai-toolkit's modules ask for their switches and the multiplier."""

    is_lorm, is_active, is_merged_in, _multiplier = False, True, False, 0.8

    @property
    def torch_multiplier(self):
        return torch.tensor([self._multiplier])


# a module holds its network weakly
NETWORK = Network()


class ToolkitLora(nn.Module):
    """ai-toolkit's `LoRAModule`."""

    def __init__(self, linear, rank=3, network=NETWORK):
        super().__init__()
        self.lora_down = plain(linear.in_features, rank)
        self.lora_up = plain(rank, linear.out_features)
        self.network_ref, self.scale, self.lora_dim = weakref.ref(network), 0.5, rank
        self.register_buffer("_runtime_scale", torch.tensor(0.5), persistent=False)
        self.dropout, self.rank_dropout, self.module_dropout = None, None, None
        self.org_forward = linear.forward
        linear.forward = self.forward

    def _call_forward(self, x):
        return self.lora_up(self.lora_down(x)) * self._runtime_scale

    def forward(self, x):
        network = self.network_ref()
        if not network.is_active or network.is_merged_in or network._multiplier == 0:
            return self.org_forward(x)
        before = self.org_forward(x)
        added = self._call_forward(x.to(self.lora_down.weight.dtype))
        return before + (added * network.torch_multiplier.mean()).to(before.dtype)


class ToolkitDora(ToolkitLora):
    """ai-toolkit's `DoRAModule`, with the scale that it has for FLUX.1."""

    def __init__(self, linear, rank=3, network=NETWORK):
        super().__init__(linear, rank, network)
        self.org_module, self.scale = [linear], 1.0
        self._runtime_scale.fill_(1)
        self.magnitude = nn.Parameter(torch.empty(linear.out_features))

    def get_orig_weight(self):
        return self.org_module[0].weight.data.detach()

    def _get_weight_norm(self, weight, change):
        return torch.linalg.norm(weight + change, dim=1)

    def apply_dora(self, x, change):
        weight = self.get_orig_weight().to(change.dtype)
        norm = self._get_weight_norm(weight, change).detach()
        return (self.magnitude / norm - 1).view(1, -1) * F.linear(x, weight + change)

    def forward(self, x):
        if not self.network_ref().is_active:
            return self.org_forward(x)
        multiplier = self.network_ref().torch_multiplier.mean()
        change = (self.lora_up.weight @ self.lora_down.weight) * multiplier
        added = self._call_forward(x) * multiplier + self.apply_dora(x, change)
        return self.org_forward(x) + added.to(x.dtype)


class ToolkitLokr(ToolkitLora):
    """ai-toolkit's `LokrModule`, its w2 in two narrow factors."""

    _fast_linear, use_w1, use_w2 = True, True, False

    def __init__(self, linear, rank=3, network=NETWORK):
        super().__init__(linear, rank, network)
        del self.lora_down, self.lora_up
        k, n = linear.in_features // 4, linear.out_features // 4
        self.lokr_w1 = nn.Parameter(torch.empty(4, 4))
        self.lokr_w2_a = nn.Parameter(torch.empty(n, rank))
        self.lokr_w2_b = nn.Parameter(torch.empty(rank, k))
        linear.forward = self.forward

    def _get_delta_factors(self):
        return self.lokr_w1, self.lokr_w2_a @ self.lokr_w2_b

    def _call_forward_fast_linear(self, x):
        w1, w2 = self._get_delta_factors()
        grid = x.unflatten(-1, (4, -1))
        added = torch.einsum("...qs,os,pq->...po", grid, w2, w1).flatten(-2)
        return added * self._runtime_scale * self.network_ref().torch_multiplier.mean()

    def forward(self, x):
        if not self.network_ref().is_active:
            return self.org_forward(x)
        return self.org_forward(x) + self._call_forward_fast_linear(x).to(x.dtype)


class OneTrainerLora(nn.Module):
    """OneTrainer's `LoRAModule`: alpha is a tensor."""

    op = staticmethod(F.linear)

    def __init__(self, linear, rank=3):
        super().__init__()
        self._orig_module, self.rank, self.dropout = [linear], rank, nn.Dropout(0)
        self.register_buffer("alpha", torch.tensor(1.5))
        self.create_layer(linear)
        self.orig_forward = linear.forward
        linear.forward = self.forward

    @property
    def orig_module(self):
        return self._orig_module[0]

    def create_layer(self, linear):
        self.lora_down = plain(linear.in_features, self.rank)
        self.lora_up = plain(self.rank, linear.out_features)

    def make_weight(self, down, up):
        return up @ down

    def delta_forward(self, x):
        return self.lora_up(self.dropout(self.lora_down(x))) * (self.alpha / self.rank)

    def forward(self, x):
        return self.orig_forward(x) + self.delta_forward(x)


class OneTrainerDora(OneTrainerLora):
    """OneTrainer's `DoRAModule`, which rescales rows."""

    decompose_output_axis = True

    def create_layer(self, linear):
        super().create_layer(linear)
        rows = self.decompose_output_axis
        shape = (linear.out_features, 1) if rows else (1, linear.in_features)
        self.dora_scale = nn.Parameter(torch.ones(shape))

    def delta_forward(self, x):
        return None

    def forward(self, x):
        change = self.make_weight(self.lora_down.weight, self.lora_up.weight)
        weight = self.orig_module.weight.detach().float() + change * (self.alpha / self.rank)
        norm = weight.detach().norm(dim=1 if self.decompose_output_axis else 0, keepdim=True)
        whole = self.dora_scale * (weight / norm)
        return self.op(x, whole.to(x.dtype), self.orig_module.bias)


class OneTrainerColumnDora(OneTrainerDora):
    """The same, which rescales columns, as it does where it isn't told otherwise."""

    decompose_output_axis = False


class OneTrainerLoha(OneTrainerLora):
    """OneTrainer's `LoHaModule`: x meets `b` first."""

    def create_layer(self, linear):
        for name in ("hada_w1", "hada_w2"):
            a, b = plain(self.rank, linear.out_features), plain(linear.in_features, self.rank)
            self.register_parameter(f"{name}_a", a.weight)
            self.register_parameter(f"{name}_b", b.weight)

    def delta_forward(self, x):
        first = self.make_weight(self.dropout(self.hada_w1_b), self.dropout(self.hada_w1_a))
        second = self.make_weight(self.dropout(self.hada_w2_b), self.dropout(self.hada_w2_a))
        return self.op(x, (first * second * (self.alpha / self.rank)).to(x.dtype))


class OneTrainerLokr(OneTrainerLora):
    """OneTrainer's `LoKrModule`, both factors whole."""

    use_w1, use_w2, tucker, weight_decompose, dora_scale, dim = True, True, False, False, None, 3

    def create_layer(self, linear):
        self.lokr_w1 = nn.Parameter(torch.empty(4, 4))
        self.lokr_w2 = nn.Parameter(torch.empty(linear.out_features // 4, linear.in_features // 4))

    def get_weight(self):
        return torch.kron(self.lokr_w1, self.lokr_w2)

    def delta_forward(self, x):
        return None

    def forward(self, x):
        change = self.get_weight() * (self.alpha / self.dim)
        return self.orig_forward(x) + self.op(x, change.to(x.dtype))


class OneTrainerAll(nn.Module):
    """OneTrainer's `_FusedLinear`: the linear that stands for several ones with the same input."""

    def __init__(self, leaves):
        super().__init__()
        self._leaves, self._leaf_forwards = leaves, [leaf.forward for leaf in leaves]
        self.in_features = leaves[0].in_features
        self.out_features = sum(leaf.out_features for leaf in leaves)

    @property
    def weight(self):
        return torch.cat([leaf.weight for leaf in self._leaves])

    @property
    def bias(self):
        return torch.cat([leaf.bias for leaf in self._leaves])

    def forward(self, x):
        return torch.cat([forward(x) for forward in self._leaf_forwards], -1)


class OneTrainerGroup:
    """OneTrainer's `FusedModuleGroup`: linears that share one of its adapters, and no module."""

    def __init__(self, leaves, make):
        self.leaves, self.synthetic = leaves, OneTrainerAll(leaves)
        self.module = make(self.synthetic)
        # it is the leaves that are hooked
        del self.synthetic.forward
        self.slices = list(accumulate(leaf.out_features for leaf in leaves))
        self.hook_to_module()

    def hook_to_module(self):
        for place, leaf in enumerate(self.leaves):
            leaf.forward = getattr(self, f"_leaf_forward_{place}")

    def remove_hook_from_module(self):
        for leaf, forward in zip(self.leaves, self.synthetic._leaf_forwards, strict=True):
            leaf.forward = forward

    def _leaf_output(self, place, start, stop, x):
        added = self.module.delta_forward(x)
        if added is None:
            return self.module.forward(x)[..., start:stop]
        return self.synthetic._leaf_forwards[place](x) + added[..., start:stop]

    def _leaf_forward_0(self, x):
        return self._leaf_output(0, 0, self.slices[0], x)

    def _leaf_forward_1(self, x):
        return self._leaf_output(1, self.slices[0], self.slices[1], x)

    def _leaf_forward_2(self, x):
        return self._leaf_output(2, self.slices[1], self.slices[2], x)

    def _leaf_forward_3(self, x):
        return self._leaf_output(3, self.slices[2], self.slices[3], x)


def linears_of(model):
    for block in model.modules():
        if type(block).__name__.endswith("Block"):
            yield from (m for m in block.modules() if type(m) is nn.Linear)


def adapted(model, make):
    """A network beside a model, as trainers keep it: what leads to it is a linear's forward."""
    network = nn.ModuleList(make(linear) for linear in list(linears_of(model)))
    randomise_trained(network)
    return network


def trained_by(model):
    """The parameters of the adapters that a model's linears call."""
    found = {}
    for i, linear in enumerate(linears_of(model)):
        owner = linear.__dict__["forward"].__self__
        found |= {f"{i}.{name}": p for name, p in owner.named_parameters() if p.requires_grad}
    return found
