"""LoKr on a linear: W x becomes W x + scale · (w1 ⊗ w2) x, with W frozen.

The shapes, starts and names of the factors are those of lycoris-lora's LokrModule, which need not
be installed. Its arithmetic is `fluxfast.ops.linear.lokr`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.lycoris_linear import LycorisLinear, device_of, whole_weight
from fluxfast.config.lycoris import LycorisOptions
from fluxfast.ops.linear.adapters import Adapter
from fluxfast.ops.linear.lokr import Lokr

Shapes = dict[str, tuple[int, ...]]


def divided(features: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `features`, the smaller one first.

    One of them is `factor` where that divides. Else the smaller one is the largest divisor that is
    not above `factor`; -1 is no limit, and gives the two that are nearest to each other. Source:
    `lycoris.functional.general.factorization`.
    """
    if factor > 0 and features % factor == 0:
        return min(factor, features // factor), max(factor, features // factor)
    limit = math.isqrt(features) if factor < 0 else min(factor, math.isqrt(features))
    small = next(d for d in range(max(limit, 1), 0, -1) if features % d == 0)
    return small, features // small


def factor_shapes(out_features: int, in_features: int, options: LycorisOptions) -> Shapes:
    """The shapes of w1 and w2, or of the two narrow factors of either, in the order of a file's.

    A factor is whole where `full_matrix` says so, and where a rank would save little: where dim is
    at least half of its longer side. w1 is also whole without `decompose_both`.
    """
    if options.factors:
        return dict(options.factors)
    i1, i2 = divided(in_features, options.factor)
    o1, o2 = divided(out_features, options.factor)
    if options.unbalanced_factorization:
        o1, o2 = o2, o1
    shapes: Shapes = {}
    for name, rows, columns, may_be_narrow in (
        ("lokr_w1", o1, i1, options.decompose_both),
        ("lokr_w2", o2, i2, True),
    ):
        narrow = may_be_narrow and not options.full_matrix
        if narrow and options.dim < max(rows, columns) / 2:
            shapes |= {f"{name}_a": (rows, options.dim), f"{name}_b": (options.dim, columns)}
        else:
            shapes[name] = (rows, columns)
    return shapes


def lokr_shapes(out_features: int, in_features: int, options: LycorisOptions) -> Shapes:
    """The shapes of everything that trains."""
    shapes = factor_shapes(out_features, in_features, options)
    if options.use_scalar:
        shapes["scalar"] = ()
    if options.weight_decompose:
        shapes["dora_scale"] = (out_features, 1)
    return shapes


def scale_of(shapes: Shapes, dim: int, alpha: float) -> float:
    """alpha / dim, or 1 where both factors are whole."""
    return 1.0 if {"lokr_w1", "lokr_w2"} <= shapes.keys() else (alpha or dim) / dim


class LokrLinear(LycorisLinear):
    """A LoKr on a linear, with the factors `lokr_w1` (or `lokr_w1_a`, `lokr_w1_b`) and `lokr_w2`.

    scalar: a trained factor of all of it, which starts at 0. dora_scale [out, 1]: the length of
    each row of the changed weight, where that is trained apart. Dropout of what the adapter adds
    has an effect with `bypass_mode` alone, and dropout of its columns without: so it is in
    lycoris-lora.

    norm: where it is given, w1 starts at ones, and w2 at normal values with the mean and the
    standard deviation of the base's weight, times this number (`init_lokr_norm`). ValueError where
    a factor is not whole then.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        options: LycorisOptions,
        dtype: torch.dtype,
        norm: float | None = None,
    ) -> None:
        super().__init__(base_layer, options)
        shapes = factor_shapes(self.out_features, self.in_features, options)
        drawn = {name: torch.empty(shape) for name, shape in shapes.items()}
        _start(drawn, moves_at_once=options.use_scalar)
        if norm is not None:
            _start_like_base(drawn, whole_weight(base_layer), norm)
        if options.use_scalar:
            drawn["scalar"] = torch.zeros(())
        if options.weight_decompose:
            drawn["dora_scale"] = whole_weight(base_layer).float().norm(dim=1, keepdim=True)
        device = device_of(base_layer)
        for name, values in drawn.items():
            self.register_parameter(name, Parameter(values.to(device, dtype)))
        self._names = tuple(shapes)
        self.scale = scale_of(shapes, options.dim, options.alpha)

    def trained(self) -> dict[str, Parameter]:
        return dict(self._parameters)  # type: ignore[arg-type]

    def lokr(self) -> Lokr:
        """What it adds, as blocks compute it."""
        options, held = self.options, self._parameters
        w1 = tuple(held[name] for name in self._names if name.startswith("lokr_w1"))
        w2 = tuple(held[name] for name in self._names if name.startswith("lokr_w2"))
        magnitude, scale = held.get("dora_scale"), self.scale
        drops = self.training
        return Lokr(
            w1,  # type: ignore[arg-type]
            w2,  # type: ignore[arg-type]
            scale if magnitude is not None else scale * options.multiplier,
            held.get("scalar"),
            magnitude,
            options.multiplier if magnitude is not None else 1.0,
            options.dropout if drops and options.bypass_mode else 0.0,
            options.rank_dropout if drops and not options.bypass_mode else 0.0,
            options.module_dropout if drops else 0.0,
        )

    def read(self) -> tuple[Adapter, ...] | str:
        lokr = self.lokr()
        if lokr.magnitude is not None:
            return "weight decomposition of a LoKr is computed by its module"
        if lokr.dropout or lokr.rank_dropout or lokr.module_dropout:
            return "a LoKr with dropout is computed by its module"
        return (lokr,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]: the maths in plain torch."""
        y, lokr = self.base_layer(x), self.lokr()
        # on the CPU, as lycoris-lora draws it
        if not self.enabled or (lokr.module_dropout and torch.rand(1) < lokr.module_dropout):
            return y
        kept = None
        if lokr.rank_dropout:
            kept = torch.rand(self.out_features, device=x.device) > lokr.rank_dropout
        if lokr.magnitude is not None:
            return y + nn.functional.linear(x, self._decomposed(lokr, kept).to(x.dtype))
        rows = x.reshape(-1, self.in_features)
        added = rows.new_zeros(len(rows), self.out_features)
        lokr.add_to(added, rows)
        added = nn.functional.dropout(added, lokr.dropout).view(y.shape)
        return y + (added if kept is None else added * kept)

    def _decomposed(self, lokr: Lokr, kept: Tensor | None = None) -> Tensor:
        """What weight decomposition adds to the base's weight [out, in].

        Source: `lycoris.functional.general.weight_decompose`, whose norm has a gradient, too.
        """
        weight = whole_weight(self.base_layer)
        changed = self._changed(lokr, weight, kept)
        assert lokr.magnitude is not None
        norm = changed.norm(dim=1, keepdim=True) + torch.finfo(changed.dtype).eps
        return changed * (lokr.multiplier * (lokr.magnitude / norm - 1) + 1) - weight

    def _changed(self, lokr: Lokr, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        w1, w2 = (ws[0] if len(ws) == 1 else ws[0] @ ws[1] for ws in (lokr.w1, lokr.w2))
        delta = torch.kron(w1, w2) * lokr.scale
        if lokr.scalar is not None:
            delta = delta * lokr.scalar
        return weight + (delta if kept is None else delta * kept[:, None])

    @torch.no_grad()
    def exported(self) -> dict[str, Tensor]:
        """The factors, with all that scales them in the first of them, and `dora_scale`.

        That is what programs read that know no scale: diffusers' `load_lora_adapter`, and ComfyUI
        where a file has no alpha. The scaled factor is in fp32, so that it is rounded once.
        """
        lokr, tensors = self.lokr(), {name: self._parameters[name] for name in self._names}
        scale = lokr.scale if lokr.scalar is None else lokr.scale * lokr.scalar.float()
        if lokr.scalar is not None or scale != 1:
            tensors[self._names[0]] = tensors[self._names[0]].float() * scale
        if (magnitude := lokr.magnitude) is not None:
            if lokr.multiplier != 1:
                norm = self._changed(lokr, whole_weight(self.base_layer)).norm(dim=1, keepdim=True)
                magnitude = lokr.multiplier * magnitude + (1 - lokr.multiplier) * norm
            tensors["dora_scale"] = magnitude
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts a file's factors in, so that scale, multiplier and scalar give what the file means.

        An `alpha` among the tensors is the options' own by now, and so is in the scale already.
        """
        for name, own in self._parameters.items():
            if own is not None and name in tensors:
                own.copy_(tensors[name])
        if (scalar := self._parameters.get("scalar")) is not None and "scalar" not in tensors:
            scalar.fill_(1)
        magnitude = self._parameters.get("dora_scale")
        multiplier = self.options.multiplier
        if multiplier == 1:
            return
        if magnitude is None:
            first = self._parameters[self._names[0]]
            assert first is not None
            first.copy_(tensors[self._names[0]] / multiplier)
        else:
            norm = self._changed(self.lokr(), whole_weight(self.base_layer)).norm(
                dim=1, keepdim=True
            )
            magnitude.copy_((tensors["dora_scale"] - (1 - multiplier) * norm) / multiplier)

    def extra_repr(self) -> str:
        shapes = (f"{name} {list(self._parameters[name].shape)}" for name in self._names)  # type: ignore[union-attr]
        return ", ".join(shapes)


def _start(factors: dict[str, Tensor], *, moves_at_once: bool) -> None:
    """The library's first values, which one seed makes the same: w2 first, and zero in the end.

    moves_at_once: a scalar is zero in its place.
    """
    for name in sorted(factors, key=lambda name: (not name.startswith("lokr_w2"), name)):
        if name in ("lokr_w2", "lokr_w2_b") and not moves_at_once:
            factors[name].zero_()
        else:
            nn.init.kaiming_uniform_(factors[name], a=math.sqrt(5))


def _start_like_base(factors: dict[str, Tensor], weight: Tensor, norm: float) -> None:
    if factors.keys() != {"lokr_w1", "lokr_w2"}:
        raise ValueError(
            "init_lokr_norm fills w1 and w2 as they are, but a rank divides them here: set "
            '"full_matrix": true in the lycoris_config, or leave init_lokr_norm out'
        )
    factors["lokr_w1"].fill_(1)
    drawn = torch.randn_like(factors["lokr_w2"])
    wide = weight.float()
    unit = (drawn - drawn.mean()) / drawn.std()
    factors["lokr_w2"].copy_((unit * wide.std().cpu() + wide.mean().cpu()) * norm)
