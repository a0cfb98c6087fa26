"""What an adapter does to the weight W [out, in] of one linear: it becomes another one, W'.

    lora      W + s · B A                       LyCORIS names A lora_down, and B lora_up
    lokr      W + s · w1 ⊗ w2                   either factor whole, or a product of two
    loha      W + s · (w1_a w1_b) ∘ (w2_a w2_b)
    glora     W + s · (W a1 a2 + b1 b2)
    full      W + diff                          and the bias becomes bias + diff_b
    ia3       W with its rows, or its columns, times 1 + weight
    diag-oft  W with blocks of its rows rotated
    boft      the same, a few times over, with the rows in another order each time

s is alpha / rank. With `dora_scale` or `lora_magnitude_vector` beside them (DoRA), W' is scaled
afterwards so that its rows, or its columns, have these norms.

This is what the modules of PEFT and lycoris-lora compute in their forward. lycoris-lora 4.1.3 has
functions for merging too, which are not asked: for LoHa and LoKr they multiply by s twice. Its
rotations are used, so diag-oft and boft need that package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.adapters.kind import AdapterFile, listed

# the tensors of one module, by the names that they have after the module's
Tensors = Mapping[str, Tensor]


class Algorithm(NamedTuple):
    """W' of a weight W, and the shape of the weights that such tensors are for.

    None in the shape stands for a size that the tensors don't tell.
    """

    merged: Callable[[Tensor, Tensors], Tensor]
    shape: Callable[[Tensors], tuple[int | None, ...]]


class Delta(NamedTuple):
    """What an adapter does to one linear: one of ALGORITHMS, and its tensors."""

    algo: str
    tensors: Tensors

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W' of `weight` [out, in], in its dtype and on its device, in a tensor of its own.

        strength: of the way from W to W', in every algorithm: 0 is W, 1 is W', 0.5 half of both.
        """
        tensors = {name: t.to(weight) for name, t in self.tensors.items()}
        changed = ALGORITHMS[self.algo].merged(weight, tensors)
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
        try:
            expected = ALGORITHMS[self.algo].shape(self.tensors)
        except KeyError as error:
            return f"has no {error.args[0]}"
        if len(expected) != len(shape) or any(
            n not in (None, m) for n, m in zip(expected, shape, strict=True)
        ):
            told = ", ".join("any" if n is None else str(n) for n in expected)
            return f"its {self.algo} is for a weight [{told}], and the base's is {list(shape)}"
        magnitude = _magnitude(self.tensors)
        if magnitude is not None and list(magnitude.shape) not in ([shape[0], 1], [1, shape[1]]):
            return f"its magnitude {list(magnitude.shape)} is not for a weight {list(shape)}"
        return None


def deltas(file: AdapterFile) -> dict[str, Delta]:
    """What a file's adapter does to each of its modules.

    Raises ValueError naming modules whose algorithm has no formula here, and for those that need
    lycoris-lora where it is not installed.
    """
    alphas = file.decides.get("lora_alpha", {})
    tensors: dict[str, dict[str, Tensor]] = {
        module: {"alpha": torch.tensor(float(alphas[module]))} if module in alphas else {}
        for module in file.targets
    }
    for key, tensor in file.state.items():
        module = key
        while module and module not in tensors:
            module = module.rpartition(".")[0]
        assert module, key
        name = key.removeprefix(f"{module}.")
        tensors[module][_SYNONYMS.get(name, name)] = tensor
    found = {
        module: Delta(_SYNONYMS.get(algo := file.algos.get(module, "lora"), algo), tensors[module])
        for module in file.targets
    }
    if unknown := [module for module, delta in found.items() if delta.algo not in ALGORITHMS]:
        raise ValueError(
            f"{file.path}: can't be merged: {listed(unknown)} are of the algorithm "
            f"{found[unknown[0]].algo!r}; expected one of {', '.join(ALGORITHMS)}"
        )
    if any(delta.algo in ("diag-oft", "boft") for delta in found.values()):
        _rotations()
    return found


# LyCORIS' names of LoRA and of its tensors
_SYNONYMS = {
    "locon": "lora",
    "dylora": "lora",
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
}


def _magnitude(tensors: Tensors) -> Tensor | None:
    """[out, 1] or [1, in]; None if the weight is not decomposed."""
    if (by_row := tensors.get("lora_magnitude_vector")) is not None:
        return by_row[:, None]
    return tensors.get("dora_scale")


def _norms_like(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The norms of a weight's rows or columns, whichever `magnitude` is of, and never zero."""
    of_rows = magnitude.shape == (len(weight), 1)
    norms = torch.linalg.vector_norm(weight, dim=1 if of_rows else 0, keepdim=True)
    return norms + torch.finfo(weight.dtype).eps


def _scale(tensors: Tensors, rank: int | None) -> float:
    """alpha / rank, times a trained scalar where a run has one.

    Without a rank, or without alpha, alpha / rank is 1.
    """
    scale = 1.0 if rank is None else float(tensors.get("alpha", rank)) / rank
    return scale * float(tensors.get("scalar", 1))


def _lora(weight: Tensor, t: Tensors) -> Tensor:
    a, b = t["lora_A.weight"], t["lora_B.weight"]
    return torch.addmm(weight, b, a, alpha=_scale(t, len(a)))


def _lokr(weight: Tensor, t: Tensors) -> Tensor:
    ranks = [len(t[f"lokr_{w}_b"]) for w in ("w1", "w2") if f"lokr_{w}_b" in t]
    # with both factors whole there is no rank, and alpha means nothing
    scale = _scale(t, ranks[0] if ranks else None)
    return weight.add(torch.kron(_lokr_factor(t, "w1"), _lokr_factor(t, "w2")), alpha=scale)


def _lokr_factor(t: Tensors, name: str) -> Tensor:
    whole = t.get(f"lokr_{name}")
    return t[f"lokr_{name}_a"] @ t[f"lokr_{name}_b"] if whole is None else whole


def _lokr_shape(t: Tensors) -> tuple[int, int]:
    ends = [(t.get(f"lokr_{w}"), w) for w in ("w1", "w2")]
    rows = [len(t[f"lokr_{w}_a"] if whole is None else whole) for whole, w in ends]
    columns = [(t[f"lokr_{w}_b"] if whole is None else whole).shape[1] for whole, w in ends]
    return rows[0] * rows[1], columns[0] * columns[1]


def _loha(weight: Tensor, t: Tensors) -> Tensor:
    change = (t["hada_w1_a"] @ t["hada_w1_b"]).mul_(t["hada_w2_a"] @ t["hada_w2_b"])
    return weight.add(change, alpha=_scale(t, len(t["hada_w1_b"])))


def _glora(weight: Tensor, t: Tensors) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    # W a1 a2 + b1 b2 as one product of narrow ones
    left, right = torch.cat([weight @ a1, b1], dim=1), torch.cat([a2, b2])
    return torch.addmm(weight, left, right, alpha=_scale(t, len(a2)))


def _full(weight: Tensor, t: Tensors) -> Tensor:
    return weight + t["diff"]


def _ia3(weight: Tensor, t: Tensors) -> Tensor:
    factors = 1 + t["weight"]
    return weight * (factors if t["on_input"] else factors[:, None])


def _ia3_shape(t: Tensors) -> tuple[int | None, int | None]:
    size = t["weight"].numel()
    return (None, size) if t["on_input"] else (size, None)


def _rotated(weight: Tensor, t: Tensors) -> Tensor:
    blocks, rescale = t["oft_blocks"], t.get("rescale")
    # lycoris-lora inverts in fp32, and can't mix it with fp64
    args = [weight.float(), blocks.float(), None if rescale is None else rescale.float()]
    # the file's alpha is the bound of the rotations' norm for each row of W, and 0 is no bound
    bound = float(t.get("alpha", 0)) * len(weight)
    # its kernels for GPUs round otherwise
    change = _rotations()[blocks.ndim](*args, constraint=bound, backend="torch")
    return weight + change.to(weight)


def _rotated_shape(t: Tensors) -> tuple[int, None]:
    *_, count, size, _ = t["oft_blocks"].shape
    return count * size, None


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


ALGORITHMS: dict[str, Algorithm] = {
    "lora": Algorithm(_lora, lambda t: (len(t["lora_B.weight"]), t["lora_A.weight"].shape[1])),
    "lokr": Algorithm(_lokr, _lokr_shape),
    "loha": Algorithm(_loha, lambda t: (len(t["hada_w1_a"]), t["hada_w1_b"].shape[1])),
    "glora": Algorithm(_glora, lambda t: (len(t["b1.weight"]), t["b2.weight"].shape[1])),
    "full": Algorithm(_full, lambda t: tuple(t["diff"].shape)),
    "ia3": Algorithm(_ia3, _ia3_shape),
    "diag-oft": Algorithm(_rotated, _rotated_shape),
    "boft": Algorithm(_rotated, _rotated_shape),
}
