"""How much an adapter changes each weight: Frobenius norms, by block and by kind of linear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fluxfast.adapters.algorithms import scale_of
from fluxfast.checkpoint.keys import bfl_linears
from fluxfast.files import atomic_file

# rows of a weight that are formed at a time, where its norm can't be had from the factors
_ROWS = 1024
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")
_TITLES = {"transformer_blocks": "double blocks", "single_transformer_blocks": "single blocks"}


class Place(NamedTuple):
    """Where a linear is: the list of blocks, the block's index in it, and its name in the block.

    Outside the blocks, `blocks` is empty and `block` 0.
    """

    blocks: str
    block: int
    linear: str

    @property
    def kind(self) -> str:
        """The name that all linears of this kind share."""
        return f"{self.blocks}.*.{self.linear}" if self.blocks else self.linear


def place_of(module: str) -> Place:
    match = _BLOCK.fullmatch(module)
    return Place(match[1], int(match[2]), match[3]) if match else Place("", 0, module)


# the kinds of FLUX.1's linears, roughly in the order in which the model has them
LINEARS = [place_of(name).kind for names in bfl_linears([0], [0]).values() for name in names]


def model_order(module: str) -> tuple[int, int]:
    """A key that sorts modules by kinds of linears as the model has them, and then by blocks."""
    place = place_of(module)
    known = place.kind in LINEARS
    return LINEARS.index(place.kind) if known else len(LINEARS), place.block


def change_norm(algorithm: str, tensors: Mapping[str, Tensor]) -> float | None:
    """‖ΔW‖ of one module at strength 1; None where it can't be told without W.

    With a magnitude (DoRA), the norm is that of the change before the rows are rescaled. No ΔW is
    formed whole.
    """
    if algorithm == "full":
        return _norm(tensors["diff"])
    if algorithm == "lora":
        norm = _product_norm(tensors["lora_B.weight"], tensors["lora_A.weight"])
    elif algorithm == "lokr":
        norm = math.prod(
            _norm(tensors[name])
            if name in tensors
            else _product_norm(tensors[f"{name}_a"], tensors[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
    elif algorithm == "loha":
        w1_a, w1_b, w2_a, w2_b = (
            tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        pieces = zip(w1_a.split(_ROWS), w2_a.split(_ROWS), strict=True)
        norm = math.hypot(*(_norm((one @ w1_b) * (two @ w2_b)) for one, two in pieces))
    else:
        return None
    return abs(scale_of(algorithm, tensors)) * norm


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left right‖ from the two Gram matrices, with left [o, r] and right [r, i]."""
    left, right = left.double(), right.double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp_(min=0).sqrt().item()


def plot_norms(norms: Mapping[str, float], path: Path, title: str) -> None:
    """Draws ‖ΔW‖ of each module: a row for each kind of linear, a column for each block."""
    # matplotlib takes a second to import, and only this needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    places = {place_of(module): norms[module] for module in sorted(norms, key=model_order)}
    panels = [blocks for blocks in (*_TITLES, "") if any(p.blocks == blocks for p in places)]
    rows = {
        blocks: list(dict.fromkeys(p.linear for p in places if p.blocks == blocks))
        for blocks in panels
    }
    height = 1.2 + sum(0.9 + 0.28 * len(rows[blocks]) for blocks in panels)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(panels), 1, squeeze=False, height_ratios=[len(rows[b]) + 1.5 for b in panels]
    )[:, 0]
    # on a logarithmic scale there is no place for 0, which stays grey
    positive = [norm for norm in norms.values() if norm > 0] or [1.0]
    scale = LogNorm(min(positive), max(max(positive), min(positive) * 1.01))
    for axis, blocks in zip(axes, panels, strict=True):
        columns = 1 + max(p.block for p in places if p.blocks == blocks)
        grid = [
            [places.get(Place(blocks, i, linear), math.nan) for i in range(columns)]
            for linear in rows[blocks]
        ]
        image = axis.imshow(grid, norm=scale, cmap="viridis", aspect="auto")
        axis.set_facecolor("0.85")
        axis.set_yticks(range(len(rows[blocks])), rows[blocks], fontsize=8)
        axis.set_title(_TITLES.get(blocks, "outside the blocks"), fontsize=9, loc="left")
        if blocks:
            axis.set_xlabel("block", fontsize=8)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.tick_params(axis="x", labelsize=8)
        else:
            axis.set_xticks([])
    figure.colorbar(image, ax=list(axes), label="Frobenius norm of the change", pad=0.01)
    figure.suptitle(f"{title} (grey: no change)", fontsize=10)
    with atomic_file(path) as stream:
        figure.savefig(stream, dpi=110, format="png")
