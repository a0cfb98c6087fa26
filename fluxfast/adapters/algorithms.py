"""The tensors of one adapted linear, by algorithm: their names, their axes, what they do to W.

Algorithms have LyCORIS's names, and so have their tensors, but for LoRA, whose names are PEFT's.
With W [o, i] of the base, rank r and s = alpha / r:

    lora      W + s B A; with a magnitude m (DoRA), the rows of that at the lengths m
    lokr      W + s w1 ⊗ w2, each either whole or the product of its _a and _b; s = 1 if both are
              whole
    loha      W + s (w1_a w1_b) ∘ (w2_a w2_b)
    glora     W + s (W a1 a2 + b1 b2)
    full      W + diff, and the bias + diff_b
    diag-oft  R W, with R of n blocks b × b that Cayley's transform makes of oft_blocks
    boft      W, multiplied by m such R in a butterfly's order
    ia3       W, its rows (or, where on_input is 1, its columns) times 1 + weight

`dora_scale` does with LoKr and LoHa what a magnitude does with LoRA, by rows where it is [o, 1] and
by columns where it is [1, i]. The alpha of diag-oft and boft is no scale but their constraint.
LyCORIS's locon and dylora are lora in a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# first axes that run over W's rows, or over the outer part of a product of two axes
_OVER_ROWS = ("o", "o1", "n")
# axes of W that are products of two of the tensors' axes, the outer one first
_PRODUCTS = {
    "lokr": {"o": ("o1", "o2"), "i": ("i1", "i2")},
    "diag-oft": {"o": ("n", "b")},
    "boft": {"o": ("n", "b")},
}
_DORA = "o 1|1 i"


class Algorithm(NamedTuple):
    """How one algorithm's tensors are recognised and checked.

    axes: the axes of each tensor, a letter an axis, or with a bar between them two choices. needs:
    for each factor, the sets of tensors of which a module has exactly one whole; whatever else
    `axes` names is optional.
    """

    label: str
    axes: dict[str, str]
    needs: tuple[tuple[tuple[str, ...], ...], ...]


ALGORITHMS: dict[str, Algorithm] = {
    "lora": Algorithm(
        "LoRA",
        {
            "lora_A.weight": "r i",
            "lora_B.weight": "o r",
            "lora_magnitude_vector": "o",
            "alpha": "",
        },
        ((("lora_A.weight", "lora_B.weight"),),),
    ),
    "lokr": Algorithm(
        "LoKr",
        {
            "lokr_w1": "o1 i1",
            "lokr_w1_a": "o1 r",
            "lokr_w1_b": "r i1",
            "lokr_w2": "o2 i2",
            "lokr_w2_a": "o2 r",
            "lokr_w2_b": "r i2",
            "alpha": "",
            "dora_scale": _DORA,
        },
        (
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")),
        ),
    ),
    "loha": Algorithm(
        "LoHa",
        {
            "hada_w1_a": "o r",
            "hada_w1_b": "r i",
            "hada_w2_a": "o r",
            "hada_w2_b": "r i",
            "alpha": "",
            "dora_scale": _DORA,
        },
        ((("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),),
    ),
    "glora": Algorithm(
        "GLoRA",
        {"a1.weight": "i r", "a2.weight": "r i", "b1.weight": "o r", "b2.weight": "r i"}
        | {"alpha": ""},
        ((("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),),
    ),
    "full": Algorithm("full weight", {"diff": "o i", "diff_b": "o"}, ((("diff",),),)),
    "diag-oft": Algorithm(
        "OFT", {"oft_blocks": "n b b", "rescale": "o 1", "alpha": ""}, ((("oft_blocks",),),)
    ),
    "boft": Algorithm(
        "BOFT", {"oft_blocks": "m n b b", "rescale": "o 1", "alpha": ""}, ((("oft_blocks",),),)
    ),
    "ia3": Algorithm("IA3", {"weight": "o", "on_input": ""}, ((("weight", "on_input"),),)),
}
# tensors that don't say by their name alone what they belong to
_AMBIGUOUS = {"weight", "alpha", "dora_scale", "rescale", "diff_b", "lora_magnitude_vector"}


class Sizes(NamedTuple):
    """What the shapes of a module's tensors tell; None where they don't."""

    out_features: int | None
    in_features: int | None
    rank: int


def recognise(parts: Mapping[str, Sequence[int]]) -> str | None:
    """The algorithm of a module with tensors of these names and shapes; None for no whole one."""
    if len(parts.get("oft_blocks", ())) == 4:
        return "boft"
    return next((name for name in ALGORITHMS if _is_whole(name, parts)), None)


def begun(parts: Iterable[str]) -> str | None:
    """The algorithm to which tensors of these names belong, even if others are missing."""
    telling = set(parts) - _AMBIGUOUS
    fits = (name for name, algorithm in ALGORITHMS.items() if telling <= algorithm.axes.keys())
    return next(fits, None) if telling else None


def _is_whole(algorithm: str, parts: Mapping[str, object]) -> bool:
    return all(
        sum(all(name in parts for name in names) for names in choices) == 1
        for choices in ALGORITHMS[algorithm].needs
    )


def required(algorithm: str) -> str:
    """The tensors that a module of an algorithm must have, for a message."""
    return ", ".join(
        " or ".join(" and ".join(names) for names in choices)
        for choices in ALGORITHMS[algorithm].needs
    )


def measure(algorithm: str, shapes: Mapping[str, Sequence[int]], *, columns: bool = False) -> Sizes:
    """The sizes that tensors of these shapes stand for.

    columns: of ia3's weight, that it is on the input. ValueError, naming the tensors, where the
    shapes don't fit together.
    """
    sizes: dict[str, int] = {}
    fits = all(_bind(algorithm, name, shape, sizes) for name, shape in shapes.items())
    for axis, (outer, inner) in _PRODUCTS.get(algorithm, {}).items():
        size = sizes.get(outer, 0) * sizes.get(inner, 0)
        fits = fits and sizes.setdefault(axis, size) == size
    if not fits or 0 in sizes.values():
        raise ValueError(_misfit(algorithm, shapes))
    if columns:
        return Sizes(None, sizes["o"], 0)
    return Sizes(sizes["o"], sizes.get("i"), sizes.get("r", 0))


def _axes(algorithm: str, name: str) -> list[str]:
    return ALGORITHMS[algorithm].axes[name].split("|")


def _bind(algorithm: str, name: str, shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Gives the axes of a tensor their sizes; False where they have others already."""
    for axes in _axes(algorithm, name):
        letters = axes.split()
        if not letters and torch.Size(shape).numel() == 1:
            return True
        bound = {"1": 1} | sizes
        if len(letters) == len(shape) and all(
            bound.setdefault(letter, size) == size
            for letter, size in zip(letters, shape, strict=True)
        ):
            sizes |= {letter: bound[letter] for letter in letters if letter != "1"}
            return True
    return False


def _misfit(algorithm: str, shapes: Mapping[str, Sequence[int]]) -> str:
    found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    expected = ", ".join(
        " or ".join(f"[{', '.join(axes.split())}]" for axes in _axes(algorithm, name))
        for name in shapes
    )
    return f"{found} don't fit together; expected {expected} of one {ALGORITHMS[algorithm].label}"


def row_parts(
    algorithm: str, tensors: Mapping[str, Tensor], rows: Sequence[int]
) -> list[dict[str, Tensor]]:
    """One module's tensors, shared out to several that have these numbers of its rows each.

    Each of the results does to its rows of W what the whole did to them, exactly. ValueError, with
    the reason, where that can't be.
    """
    if reason := _inseparable(algorithm, tensors):
        raise ValueError(reason)
    result: list[dict[str, Tensor]] = [{} for _ in rows]
    for name, tensor in tensors.items():
        if not _over_rows(algorithm, name, tensors):
            pieces = [tensor] * len(rows)
        else:
            unit = sum(rows) // len(tensor)
            if any(count % unit for count in rows):
                raise ValueError(
                    f"{name} {list(tensor.shape)} can't be shared out to {len(rows)} linears of "
                    f"{', '.join(map(str, rows))} rows: each of its rows stands for {unit} of them"
                )
            pieces = list(tensor.split([count // unit for count in rows]))
        for part, piece in zip(result, pieces, strict=True):
            part[name] = piece
    return result


def swapped(algorithm: str, tensors: Mapping[str, Tensor], out_features: int) -> dict[str, Tensor]:
    """One module's tensors for a W whose two halves of the rows have changed places.

    ValueError, with the reason, where that can't be.
    """
    first, second = row_parts(algorithm, tensors, [out_features // 2] * 2)
    return {
        name: torch.cat([second[name], first[name]])
        if _over_rows(algorithm, name, tensors)
        else tensor
        for name, tensor in tensors.items()
    }


def _over_rows(algorithm: str, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor's first axis runs over W's rows."""
    if algorithm == "ia3":
        return name == "weight" and not tensors["on_input"].any()
    return _axes(algorithm, name)[0].partition(" ")[0] in _OVER_ROWS


def _inseparable(algorithm: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a module's change of some rows of W can't be told from that of the others."""
    if algorithm == "boft":
        return "BOFT mixes all rows of a weight"
    if algorithm == "diag-oft" and tensors["alpha"].item() > 0:
        return "its constraint is on the norm of all blocks together"
    if "dora_scale" in tensors and tensors["dora_scale"].shape[0] == 1:
        return "its dora_scale divides by the norms of whole columns"
    return None


def whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor of LoKr, `lokr_w1` or `lokr_w2`, whole."""
    if name in tensors:
        return tensors[name]
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def scale_of(algorithm: str, tensors: Mapping[str, Tensor]) -> float:
    """alpha / rank of a module's tensors, and 1 where an algorithm has no such scale."""
    rank = measure(algorithm, {name: tensor.shape for name, tensor in tensors.items()}).rank
    scaled = algorithm in ("lora", "loha", "glora", "lokr") and rank > 0
    return tensors["alpha"].item() / rank if scaled else 1.0
