"""TREAD (Krause et al., arXiv 2501.04765): during training, a random part of the image tokens skips
a range of blocks.

A route drops tokens just before its first block and puts them back, as they were there, just after
its last; both ends are counted. Blocks are numbered through both kinds, double ones first. Text is
never dropped. Kept tokens stay in order and keep their positions: attention sees them with the
rotary rows that they have in the whole image.

The keep count is K = S - round(S·ratio); with a force-keep mask, at least the largest number of
forced tokens of a sample, so that a batch keeps one shape. With K = S a route does nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxfast.model.pinned import pin, send
from fluxfast.ops.token_route import token_gather, token_scatter


class Route(NamedTuple):
    """Drop `ratio` of the image tokens in blocks first..last, counted from 0 through both kinds,
    both included.
    """

    ratio: float
    first: int
    last: int


def resolve_routes(routes: Iterable[Mapping[str, Any]], blocks: int) -> tuple[Route, ...]:
    """The routes of a `tread_config` on a model of so many blocks; indices below 0 count from its
    end.

    Raises ValueError, naming the route, where one is out of range, ends before it starts, or begins
    before the one before it has ended.
    """
    resolved: list[Route] = []
    for number, entry in enumerate(routes):
        ratio, start, end = (
            entry["selection_ratio"],
            entry["start_layer_idx"],
            entry["end_layer_idx"],
        )
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
                f"{resolved[-1].last}; routes are "
                "given in order and may not overlap"
            )
        resolved.append(Route(float(ratio), first, last))
    return tuple(resolved)


def keep_count(tokens: int, ratio: float) -> int:
    return tokens - round(tokens * ratio)


# by the block that a route starts at: the tokens that it keeps [B, K], sorted; None where it keeps
# all
Draws = dict[int, Tensor | None]


class Kept(NamedTuple):
    """The tokens of a route under way: their indices [B, K] in the image, all image tokens [B, S,
    D] from before it.
    """

    indices: Tensor
    before: Tensor


class Router:
    """The routes of a model and the random numbers that they use (from a generator of their own, on
    the CPU).

    The draw depends on nothing but the generator's state, so that a resumed run drops the same
    tokens; and it happens before the blocks, so that a block that is recomputed for its backward
    sees the same ones.
    """

    def __init__(self, routes: Sequence[Route], seed: int = 42) -> None:
        self.routes = tuple(routes)
        self.generator = torch.Generator().manual_seed(seed)
        self._starts = {route.first: route for route in self.routes if route.ratio > 0}
        self._ends = {route.last for route in self.routes if route.ratio > 0}

    def draws(
        self, batch: int, tokens: int, force_keep: Tensor | None, device: torch.device
    ) -> Draws:
        """A `draw` for each route of a forward, by the block that it starts at."""
        return {
            first: self.draw(batch, tokens, route.ratio, force_keep, device)
            for first, route in self._starts.items()
        }

    def ends_at(self, block: int) -> bool:
        return block in self._ends

    def draw(
        self, batch: int, tokens: int, ratio: float, force_keep: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Sorted indices [B, K] of the tokens to keep, uniformly at random; None where all are
        kept.

        force_keep: bool [B, tokens], true where a token must not be dropped.
        """
        keep = keep_count(tokens, ratio)
        # drawn even if nothing is dropped, so that one sample's mask does not move the next draw
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
    """Rows of the rotary tables [B, txt_len + K] for text and kept image tokens."""
    text = torch.arange(txt_len, device=kept.device).expand(len(kept), -1)
    return torch.cat([text, kept + txt_len], dim=1)


class RouteState:
    """One forward's way through the routes: which image tokens are in play, and the tables that go
    with them.
    """

    def __init__(
        self, router: Router | None, draws: Draws, tables: tuple[Tensor, Tensor], txt_len: int
    ) -> None:
        """draws: `router`'s, for this forward; empty without one."""
        self._router, self._draws, self._tables, self._txt_len = router, draws, tables, txt_len
        self._kept: Kept | None = None
        self.pe: tuple[Tensor, ...] = tables

    def before(self, block: int, img: Tensor) -> Tensor:
        """img [B, S, D], less the tokens that a route starting at this block drops."""
        index = self._draws.get(block)
        if index is None:
            return img
        img, self._kept = token_gather(img, index), Kept(index, img)
        self.pe = (*self._tables, joint_index(index, self._txt_len))
        return img

    def after(self, block: int, img: Tensor) -> Tensor:
        """img with the dropped tokens back, if a route ends at this block."""
        if self._kept is None or self._router is None or not self._router.ends_at(block):
            return img
        whole = token_scatter(self._kept.before, img, self._kept.indices)
        self._kept, self.pe = None, self._tables
        return whole

    def before_joint(self, block: int, x: Tensor) -> Tensor:
        return self._on_image(x, self.before(block, x[:, self._txt_len :]))

    def after_joint(self, block: int, x: Tensor) -> Tensor:
        return self._on_image(x, self.after(block, x[:, self._txt_len :]))

    def _on_image(self, x: Tensor, img: Tensor) -> Tensor:
        # most blocks neither start nor end a route: the joint tensor goes on as it is
        if img.shape[1] + self._txt_len == x.shape[1]:
            return x
        return torch.cat([x[:, : self._txt_len], img], dim=1)

    def of_kept(self, sample: Tensor) -> Tensor:
        """A ControlNet residual [B, S, D] of the tokens in play."""
        return sample if self._kept is None else token_gather(sample, self._kept.indices)
