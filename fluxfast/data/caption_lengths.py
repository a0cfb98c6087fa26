"""Which captions are longer than the text encoders read.

The tokenizers count where their files are on this machine; elsewhere the number is estimated.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from fluxfast.data.model_folders import ModelSource, local_folder

CLIP_TOKENS = 77
# of English text, about; other scripts take more bytes for a character, and more tokens
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of captions for CLIP and for T5.

    `estimated` says why the numbers are estimates; it is empty where they are exact.
    """

    clip: Callable[[Sequence[str]], list[int]]
    t5: Callable[[Sequence[str]], list[int]]
    clip_limit: int
    t5_limit: int
    estimated: str = ""


@dataclass(frozen=True)
class LongCaption:
    """A caption with more tokens than an encoder reads."""

    file: str
    caption: str
    tokens: int


@dataclass(frozen=True)
class LongCaptions:
    """The captions of a dataset that T5 cuts, and those that CLIP cuts; `total` counts all."""

    total: int
    t5: list[LongCaption]
    clip: list[LongCaption]


def token_counter(pipeline: ModelSource, *, max_length: int) -> TokenCounter:
    """The tokenizers of a pipeline's folder or repository; nothing is downloaded.

    max_length: T5 tokens per caption.
    """
    path, _, revision = pipeline
    try:
        folders = [
            local_folder((path, part, revision), download=False)
            for part in ("tokenizer", "tokenizer_2")
        ]
        # transformers takes seconds to import
        from fluxfast.data.tokens import load_tokenizers, token_counts

        clip, t5 = load_tokenizers(*folders)
    except ValueError:
        why = f"the tokenizers of {path} are not on this machine, or can't be loaded"
        return TokenCounter(_estimate, _estimate, CLIP_TOKENS, max_length, why)
    return TokenCounter(
        lambda captions: token_counts(clip, captions),
        lambda captions: token_counts(t5, captions),
        clip.model_max_length,
        max_length,
    )


def long_captions(captions: Iterable[tuple[str, str]], counter: TokenCounter) -> LongCaptions:
    """Those of the (file, caption) pairs that have too many tokens for T5, and for CLIP."""
    pairs = list(captions)
    texts = [caption for _, caption in pairs]

    def beyond(counts: list[int], limit: int) -> list[LongCaption]:
        return [
            LongCaption(file, caption, tokens)
            for (file, caption), tokens in zip(pairs, counts, strict=True)
            if tokens > limit
        ]

    return LongCaptions(
        len(pairs),
        beyond(counter.t5(texts), counter.t5_limit),
        beyond(counter.clip(texts), counter.clip_limit),
    )


def _estimate(captions: Sequence[str]) -> list[int]:
    # the special tokens are two for CLIP and one for T5
    return [ceil(len(text.encode(errors="replace")) / _BYTES_PER_TOKEN) + 2 for text in captions]
