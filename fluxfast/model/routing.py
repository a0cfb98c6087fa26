"""TREAD: during training, a random part of the image tokens skips a range of blocks.

The method is Krause et al.'s (arXiv 2501.04765). A route drops tokens just before its first block
and puts them back just after its last one, with the values that they had before the first. Blocks
are numbered through both kinds, double blocks first. Text is never dropped. Kept tokens stay in
order and keep their positions: RoPE gives them the rows that they have in the whole image.

A route keeps K = S - round(S·ratio) of S tokens. With a force-keep mask it keeps at least as many
as the sample with the most forced tokens has, so that all samples of a batch keep the same number.
With K = S a route does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.model.pinned import pin, send
from fluxfast.ops.token_route import token_gather, token_scatter


class Route(NamedTuple):
    """Drop `ratio` of the image tokens in blocks `first` to `last`, both included."""

    ratio: float
    first: int
    last: int


def resolve_routes(routes: Iterable[Mapping[str, Any]], blocks: int) -> tuple[Route, ...]:
    """The routes of a `tread_config` on a model of so many blocks.

    Indices below 0 count from the last block. Raises ValueError, naming the route, where one is out
    of range, ends before it starts, or starts before the one before it has ended.
    """
    resolved: list[Route] = []
    for number, entry in enumerate(routes):
        ratio = entry["selection_ratio"]
        start, end = entry["start_layer_idx"], entry["end_layer_idx"]
        name = f"tread_config route {number} (blocks {start} to {end}, ratio {ratio})"
        if not 0 <= ratio < 1:
            raise ValueError(
                f"{name}: selection_ratio is the part of the image tokens to drop, from 0 up to "
                "but not 1"
            )
        for index in (start, end):
            if not -blocks <= index < blocks:
                raise ValueError(
                    f"{name}: there is no block {index}; the model has {blocks}, 0 to {blocks - 1}"
                )
        first, last = start % blocks, end % blocks
        if first > last:
            raise ValueError(f"{name}: it ends at block {last}, before it starts at block {first}")
        if resolved and first <= resolved[-1].last:
            raise ValueError(
                f"{name}: it starts at block {first}, but the route before it ends at block "
                f"{resolved[-1].last}; routes are given in order and may not overlap"
            )
        resolved.append(Route(float(ratio), first, last))
    return tuple(resolved)


def keep_count(tokens: int, ratio: float) -> int:
    """How many of so many tokens a route keeps."""
    return tokens - round(tokens * ratio)


# for each route of a forward, by the block that it starts at: the tokens that it keeps [B, K],
# sorted, or None where it keeps all
Draws = dict[int, Tensor | None]


class ActiveRoute(NamedTuple):
    """A route between its first and its last block."""

    # the kept tokens' [B, K], in the image
    indices: Tensor
    # all image tokens as they were before the route [B, S, D]
    before: Tensor


class Router:
    """The routes of a model, and a generator on the CPU that draws the tokens that they keep.

    A draw depends on the generator's state alone, so that a resumed run drops the same tokens. It
    happens before the blocks run, so that a block that is recomputed in backward sees the same
    ones.
    """

    def __init__(self, routes: Sequence[Route], seed: int = 42) -> None:
        self.routes = tuple(routes)
        self.generator = torch.Generator().manual_seed(seed)
        self._starts = {route.first: route for route in self.routes if route.ratio > 0}
        self._ends = {route.last for route in self.routes if route.ratio > 0}

    def draws(
        self,
        batch: int,
        tokens: int,
        force_keep: Tensor | None,
        device: torch.device,
        references: int = 0,
    ) -> Draws:
        """One `draw` for each route that drops tokens.

        references: how many tokens of reference images follow the `tokens` of the image. They are
        all kept, and no part of what a ratio is taken of.
        """
        draws = {
            first: self.draw(batch, tokens, route.ratio, force_keep, device)
            for first, route in self._starts.items()
        }
        if not references:
            return draws
        behind = torch.arange(tokens, tokens + references, device=device).expand(batch, -1)
        return {
            first: kept if kept is None else torch.cat([kept, behind], dim=1)
            for first, kept in draws.items()
        }

    def ends_at(self, block: int) -> bool:
        """Whether a route that drops tokens has this block as its last."""
        return block in self._ends

    def draw(
        self, batch: int, tokens: int, ratio: float, force_keep: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Sorted indices [B, K] of random tokens to keep; None where all are kept.

        force_keep: bool [B, tokens], true where a token must not be dropped. Raises ValueError on
        another shape.
        """
        keep = keep_count(tokens, ratio)
        # drawn even if nothing is dropped, so that this batch's mask does not change the next draw
        scores = torch.rand(batch, tokens, generator=self.generator)
        if force_keep is not None:
            forced = force_keep.to("cpu", torch.bool)
            if forced.shape != (batch, tokens):
                raise ValueError(
                    f"force_keep_mask: expected [{batch}, {tokens}] (image tokens), got "
                    f"{list(forced.shape)}"
                )
            keep = max(keep, int(forced.sum(dim=1).max()))
            scores = scores.masked_fill(forced, -1.0)
        if keep == tokens:
            return None
        kept = scores.topk(keep, dim=1, largest=False).indices.sort(dim=1).values
        return send(pin(kept, device), device)


def joint_index(kept: Tensor, txt_len: int) -> Tensor:
    """The rows of the rotary tables [B, txt_len + K] for text and kept image tokens."""
    text = torch.arange(txt_len, device=kept.device).expand(len(kept), -1)
    return torch.cat([text, kept + txt_len], dim=1)


class RouteState:
    """One forward's way through the routes: it drops tokens and puts them back.

    `pe` is always the tables for the tokens that are left, as blocks take them.
    """

    def __init__(
        self, router: Router | None, draws: Draws, tables: tuple[Tensor, Tensor], txt_len: int
    ) -> None:
        """draws: `router`'s, for this forward; empty without a router."""
        self._router, self._draws, self._tables, self._txt_len = router, draws, tables, txt_len
        self._active: ActiveRoute | None = None
        self.pe: tuple[Tensor, ...] = tables

    def before(self, block: int, img: Tensor) -> Tensor:
        """img [B, S, D] without the tokens that a route starting at this block drops."""
        index = self._draws.get(block)
        if index is None:
            return img
        img, self._active = token_gather(img, index), ActiveRoute(index, img)
        self.pe = (*self._tables, joint_index(index, self._txt_len))
        return img

    def after(self, block: int, img: Tensor) -> Tensor:
        """img with the dropped tokens put back, if a route ends at this block."""
        if self._active is None or self._router is None or not self._router.ends_at(block):
            return img
        whole = token_scatter(self._active.before, img, self._active.indices)
        self._active, self.pe = None, self._tables
        return whole

    def before_joint(self, block: int, x: Tensor) -> Tensor:
        """As `before`, of the joint sequence x [B, S_txt + S, D]."""
        return self._on_image(x, self.before(block, x[:, self._txt_len :]))

    def after_joint(self, block: int, x: Tensor) -> Tensor:
        """As `after`, of the joint sequence x."""
        return self._on_image(x, self.after(block, x[:, self._txt_len :]))

    def _on_image(self, x: Tensor, img: Tensor) -> Tensor:
        # most blocks neither start nor end a route, and then nothing is copied
        if img.shape[1] + self._txt_len == x.shape[1]:
            return x
        return torch.cat([x[:, : self._txt_len], img], dim=1)

    def of_kept(self, sample: Tensor) -> Tensor:
        """The part of a ControlNet residual [B, S, D] that belongs to the tokens that are left."""
        return sample if self._active is None else token_gather(sample, self._active.indices)
