"""The tokenizers of the two text encoders, and how many tokens a caption has in each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, T5TokenizerFast

from fluxfast.data.model_folders import load_from


def load_tokenizers(clip: Path, t5: Path) -> tuple[Any, Any]:
    """CLIP's tokenizer and T5's from their folders.

    Raises ValueError naming a folder that does not hold what it should.
    """
    return load_from(CLIPTokenizer, clip), load_from(T5TokenizerFast, t5)


def token_counts(tokenizer: Any, captions: Sequence[str]) -> list[int]:
    """How many tokens each caption has before it is cut, the special ones included."""
    return [len(tokens) for tokens in tokenizer(list(captions)).input_ids] if captions else []
