"""What an adapter does to the weight W [out, in] of one linear: it becomes another one, W'.

The formulas are those of `algorithms`, as PEFT's and lycoris-lora's modules compute them in their
forward. lycoris-lora 4.1.3 has functions for merging too, which are not asked: for LoHa and LoKr
they multiply by alpha / rank twice. Its rotations are used, so diag-oft and boft need that package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.adapters.algorithms import measure, scale_of, whole
from fluxfast.adapters.kind import AdapterFile

# the tensors of one module, by the names that `algorithms` gives them
Tensors = Mapping[str, Tensor]


class Delta(NamedTuple):
    """What an adapter does to one linear: an algorithm of `algorithms`, and its tensors."""

    algorithm: str
    tensors: Tensors

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W' of `weight` [out, in], in its dtype and on its device, in a tensor of its own.

        strength: of the way from W to W', in every algorithm: 0 is W, 1 is W', 0.5 half of both.
        """
        tensors = {name: t.to(weight) for name, t in self.tensors.items()}
        changed = MERGED[self.algorithm](weight, tensors)
        if (magnitude := _magnitude(tensors)) is not None:
            changed *= magnitude / _norms_like(changed, magnitude)
        return changed if strength == 1 else torch.lerp(weight, changed, strength)

    def merged_bias(self, bias: Tensor, strength: float = 1.0) -> Tensor:
        """The bias [out] that belongs to `merged`: only `full` may have another than `bias`."""
        change = self.tensors.get("diff_b")
        return bias if change is None else bias + strength * change.to(bias)

    @property
    def changes_bias(self) -> bool:
        return "diff_b" in self.tensors

    def fits(self, shape: tuple[int, ...]) -> str | None:
        """Why the tensors are not for a weight of `shape`; None if they are."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        columns = "on_input" in shapes and bool(self.tensors["on_input"].any())
        sizes = measure(self.algorithm, shapes, columns=columns)
        expected = [sizes.out_features, sizes.in_features]
        if any(size not in (None, n) for size, n in zip(expected, shape, strict=True)):
            told = ", ".join("any" if size is None else str(size) for size in expected)
            return f"its {self.algorithm} is for a weight [{told}], and the base's is {list(shape)}"
        return None


def deltas(file: AdapterFile) -> dict[str, Delta]:
    """What an adapter that `read_adapter` read does to each of its modules.

    Raises ValueError where that needs lycoris-lora, and it is not installed.
    """
    found = {
        module: Delta(file.algorithm(module), tensors) for module, tensors in file.tensors().items()
    }
    if any(MERGED[delta.algorithm] is _rotated for delta in found.values()):
        _rotations()
    return found


def _magnitude(tensors: Tensors) -> Tensor | None:
    """[out, 1] or [1, in]; None if the weight is not decomposed."""
    if (of_rows := tensors.get("lora_magnitude_vector")) is not None:
        return of_rows[:, None]
    return tensors.get("dora_scale")


def _norms_like(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The norms of a weight's rows or columns, whichever `magnitude` is of, and never zero."""
    of_rows = magnitude.shape == (len(weight), 1)
    norms = torch.linalg.vector_norm(weight, dim=1 if of_rows else 0, keepdim=True)
    return norms + torch.finfo(weight.dtype).eps


def _lora(weight: Tensor, t: Tensors) -> Tensor:
    return torch.addmm(weight, t["lora_B.weight"], t["lora_A.weight"], alpha=scale_of("lora", t))


def _lokr(weight: Tensor, t: Tensors) -> Tensor:
    change = torch.kron(whole(t, "lokr_w1"), whole(t, "lokr_w2"))
    return weight.add(change, alpha=scale_of("lokr", t))


def _loha(weight: Tensor, t: Tensors) -> Tensor:
    change = (t["hada_w1_a"] @ t["hada_w1_b"]).mul_(t["hada_w2_a"] @ t["hada_w2_b"])
    return weight.add(change, alpha=scale_of("loha", t))


def _glora(weight: Tensor, t: Tensors) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    # W a1 a2 + b1 b2 as one product of narrow ones
    left, right = torch.cat([weight @ a1, b1], dim=1), torch.cat([a2, b2])
    return torch.addmm(weight, left, right, alpha=scale_of("glora", t))


def _full(weight: Tensor, t: Tensors) -> Tensor:
    return weight + t["diff"]


def _ia3(weight: Tensor, t: Tensors) -> Tensor:
    factors = 1 + t["weight"]
    return weight * (factors if t["on_input"].any() else factors[:, None])


def _rotated(weight: Tensor, t: Tensors) -> Tensor:
    blocks, rescale = t["oft_blocks"], t.get("rescale")
    # lycoris-lora inverts in fp32, and can't mix it with fp64
    args = [weight.float(), blocks.float(), None if rescale is None else rescale.float()]
    # alpha bounds the norm of the rotations, for each row of W; 0 is no bound
    bound = float(t.get("alpha", 0)) * len(weight)
    # its kernels for GPUs round otherwise
    change = _rotations()[blocks.ndim](*args, constraint=bound, backend="torch")
    return weight + change.to(weight)


def _rotations() -> dict[int, Callable[..., Tensor]]:
    """lycoris-lora's functions for W' - W, by the dimensions of the blocks that they take."""
    try:
        from lycoris.functional import boft, diag_oft
    except ImportError as error:
        raise ValueError(
            "merging diag-oft or boft needs the package lycoris-lora: pip install "
            "'fluxfast[lycoris]'"
        ) from error
    return {3: diag_oft.diff_weight, 4: boft.diff_weight}


# W' by algorithm, before a magnitude scales it
MERGED: dict[str, Callable[[Tensor, Tensors], Tensor]] = {
    "lora": _lora,
    "lokr": _lokr,
    "loha": _loha,
    "glora": _glora,
    "full": _full,
    "ia3": _ia3,
    "diag-oft": _rotated,
    "boft": _rotated,
}
