"""Attention that leaves the text's padding out: a mask over the keys of the joint sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def joint_mask(text: Tensor, image_tokens: int) -> Tensor:
    """A mask for attention, bool [B, 1, 1, S_txt + S_img], of the text's, bool [B, S_txt].

    True is attended to, as every image token is. Text comes first in the joint sequence.
    """
    image = text.new_ones((len(text), image_tokens))
    return torch.cat([text, image], dim=1)[:, None, None]


class MaskedText:
    """The keyword arguments of a forward's blocks, with the mask for as many tokens as there are.

    A route changes their number, and with it the mask's length. What it drops and keeps are image
    tokens, which are all attended to.
    """

    def __init__(self, text: Tensor | None, kwargs: dict[str, Any]) -> None:
        """text: bool [B, S_txt]; None: no token is left out."""
        self._text, self._kwargs = text, kwargs
        self._of: dict[int, dict[str, Any]] = {}

    def beside(self, image_tokens: int) -> dict[str, Any]:
        """The arguments for so many image tokens."""
        if self._text is None:
            return self._kwargs
        if image_tokens not in self._of:
            mask = joint_mask(self._text, image_tokens)
            self._of[image_tokens] = {**self._kwargs, "attention_mask": mask}
        return self._of[image_tokens]
