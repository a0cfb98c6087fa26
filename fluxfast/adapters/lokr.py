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
from fluxfast.ops.linear.adapters import Adapter, is_random
from fluxfast.ops.linear.lokr import Lokr

Shapes = dict[str, tuple[int, ...]]

NORM_OF_WHOLE = (
    "init_lokr_norm fills w1 and w2 as they are, but a rank divides them here: set "
    '"full_matrix": true in the lycoris_config, or leave init_lokr_norm out'
)


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


def is_whole(shapes: Shapes) -> bool:
    """Whether both factors are whole, so that there is no rank that divides alpha."""
    return {"lokr_w1", "lokr_w2"} <= shapes.keys()


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
        self._whole = is_whole(shapes)
        self.scale = 1.0 if self._whole else (options.alpha or options.dim) / options.dim

    def trained(self) -> dict[str, Parameter]:
        return dict(self._parameters)  # type: ignore[arg-type]

    def lokr(self) -> Lokr:
        """What it adds, as blocks compute it."""
        options, held = self.options, self._parameters
        w1 = tuple(held[name] for name in self._names if name.startswith("lokr_w1"))
        w2 = tuple(held[name] for name in self._names if name.startswith("lokr_w2"))
        magnitude, multiplier, drops = held.get("dora_scale"), options.multiplier, self.training
        return Lokr(
            w1,  # type: ignore[arg-type]
            w2,  # type: ignore[arg-type]
            self.scale * (multiplier if magnitude is None else 1.0),
            held.get("scalar"),
            magnitude,
            1.0 if magnitude is None else multiplier,
            out_dropout=options.dropout if drops and options.bypass_mode else 0.0,
            rank_dropout=options.rank_dropout if drops and not options.bypass_mode else 0.0,
            module_dropout=options.module_dropout if drops else 0.0,
        )

    def read(self, *, share_dropout: bool) -> tuple[Adapter, ...] | str:
        lokr = self.lokr()
        if not share_dropout and is_random(lokr):
            return "a LoKr has a dropout"
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
        added = nn.functional.dropout(added, lokr.out_dropout).view(y.shape)
        return y + (added if kept is None else added * kept)

    def _decomposed(self, lokr: Lokr, kept: Tensor | None = None) -> Tensor:
        """What weight decomposition adds to the base's weight [out, in].

        Source: `lycoris.functional.general.weight_decompose`, whose norm has a gradient, too.
        """
        weight = whole_weight(self.base_layer)
        changed = self._changed(lokr, weight, kept)
        assert lokr.magnitude is not None
        grown = lokr.magnitude / self._norm(changed)
        return changed * (lokr.multiplier * (grown - 1) + 1) - weight

    @staticmethod
    def _norm(changed: Tensor) -> Tensor:
        return changed.norm(dim=1, keepdim=True) + torch.finfo(changed.dtype).eps

    def _changed(self, lokr: Lokr, weight: Tensor, kept: Tensor | None = None) -> Tensor:
        w1, w2 = (ws[0] if len(ws) == 1 else ws[0] @ ws[1] for ws in (lokr.w1, lokr.w2))
        delta = torch.kron(w1, w2) * lokr.scale
        if lokr.scalar is not None:
            delta = delta * lokr.scalar
        return weight + (delta if kept is None else delta * kept[:, None])

    def numbers(self) -> dict[str, Tensor]:
        """alpha, which a rank divides: none where both factors are whole."""
        if self._whole:
            return {}
        multiplier = 1.0 if self.options.weight_decompose else self.options.multiplier
        alpha = self.scale * self.options.dim * multiplier
        return {"alpha": torch.tensor(alpha, dtype=torch.float64)}

    @torch.no_grad()
    def exported(self) -> dict[str, Tensor]:
        held = {name: p.detach() for name, p in self.trained().items()}
        multiplier = self.options.multiplier
        if self.options.weight_decompose and multiplier != 1:
            norm = self._norm(self._changed(self.lokr(), whole_weight(self.base_layer)))
            held["dora_scale"] = multiplier * held["dora_scale"] + (1 - multiplier) * norm
        elif self._whole and multiplier != 1:
            held["lokr_w1"] = held["lokr_w1"].float() * multiplier
        # whoever reads an alpha of whole factors divides it by the same rank
        whole = {"alpha": torch.tensor(float(self.options.dim))} if self._whole else {}
        return held | whole | self.numbers()

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        own, multiplier = self.trained(), self.options.multiplier
        for name in self._names:
            own[name].copy_(tensors[name])
        if "scalar" in own:
            own["scalar"].fill_(1)
        if "dora_scale" in own:
            norm = self._norm(self._changed(self.lokr(), whole_weight(self.base_layer)))
            own["dora_scale"].copy_(
                (tensors["dora_scale"] - (1 - multiplier) * norm) / multiplier
                if multiplier != 1
                else tensors["dora_scale"]
            )
        elif self._whole:
            own["lokr_w1"].div_(multiplier)

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
        raise ValueError(NORM_OF_WHOLE)
    factors["lokr_w1"].fill_(1)
    drawn = torch.randn_like(factors["lokr_w2"])
    wide = weight.float()
    unit = (drawn - drawn.mean()) / drawn.std()
    factors["lokr_w2"].copy_((unit * wide.std().cpu() + wide.mean().cpu()) * norm)
