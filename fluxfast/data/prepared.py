"""What data preparation hands to training: datasets with cached latents, and cached prompts."""

from dataclasses import dataclass

import torch

from fluxfast.data.cache import TensorCache
from fluxfast.data.dataset_report import DataReport
from fluxfast.text import printable


class LostEntry(ValueError):
    """A cached tensor that was whole at the start and has been lost or damaged since.

    The next start computes it anew.
    """

    def __init__(self, cache: TensorCache, what: str) -> None:
        super().__init__(
            f"{cache.folder}: {what} are not in the cache any more (lost or damaged since the "
            "start). Start again with the same command: the run goes on from its last checkpoint, "
            "and they are computed anew"
        )
        self.what = what


@dataclass(frozen=True)
class Sample:
    """A training image.

    `file` is its path below the dataset's folder, `target` its training size (width, height). `key`
    and `fingerprint` are its latents' in the cache.
    """

    file: str
    captions: tuple[str, ...]
    target: tuple[int, int]
    key: str
    fingerprint: str

    @property
    def bucket(self) -> str:
        """The name of its size; samples of one bucket can share a batch."""
        return f"{self.target[0]}x{self.target[1]}"


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """A dataset whose latents are all cached.

    The fields from `repeats` on are those of `config.datasets.ImageDataset`.
    """

    id: str
    samples: tuple[Sample, ...]
    cache: TensorCache
    repeats: int = 0
    probability: float = 1.0
    train_batch_size: int = 1
    start_epoch: int = 1
    start_step: int = 0
    end_epoch: int | None = None
    end_step: int | None = None
    timestep_sampling_offset: float = 0.0
    is_regularisation_data: bool = False

    def latents(self, sample: Sample) -> torch.Tensor:
        """A sample's latents, bf16 [C, H/8, W/8].

        Raises LostEntry if their cache file was lost or damaged since the start.
        """
        tensors = self.cache.get(sample.key, sample.fingerprint)
        if tensors is None:
            raise LostEntry(
                self.cache, f"the latents of {printable(sample.file)} (dataset {self.id!r})"
            )
        return tensors["latents"]


@dataclass(frozen=True)
class PromptCache:
    """The text encoders' outputs for every caption of a run, for "" and for extra prompts."""

    cache: TensorCache
    fingerprint: str

    def get(self, prompt: str) -> dict[str, torch.Tensor]:
        """The embeddings of a prompt: `prompt_embeds` [L, T5 width] and `pooled_prompt_embeds`
        [CLIP width] in bf16, `attention_mask` bool [L].

        Raises LostEntry if the prompt was not prepared, or if its cache file was lost or damaged
        since the start.
        """
        tensors = self.cache.get(prompt, self.fingerprint)
        if tensors is None:
            raise LostEntry(self.cache, f"the embeddings of {prompt!r}")
        return tensors


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data; `report` prints as the closing table."""

    datasets: tuple[PreparedDataset, ...]
    prompts: PromptCache
    report: DataReport
