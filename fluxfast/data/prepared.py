"""What data preparation hands to training: datasets with cached latents, and cached prompts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fluxfast.data.cache import TensorCache
from fluxfast.data.dataset_report import DataReport
from fluxfast.data.images import UnreadableImage
from fluxfast.data.pairs import mask_weights
from fluxfast.data.scan import Candidate
from fluxfast.text import printable


class Unavailable(ValueError):
    """Tensors that a batch needs and can't have.

    `what` names them, `told` says what is wrong with them, and `remedy` what helps.
    """

    what: str
    told: str
    remedy: str


class LostEntry(Unavailable):
    """A cached tensor that was whole at the start and has been lost or damaged since.

    The next start computes it anew.
    """

    remedy = "the next start computes them anew"

    def __init__(self, cache: TensorCache, what: str) -> None:
        super().__init__(
            f"{cache.folder}: {what} are not in the cache any more (lost or damaged since the "
            "start). Start again with the same command: the run goes on from its last checkpoint, "
            "and they are computed anew"
        )
        self.what = what
        self.told = f"{what} are lost or damaged since the start"


class NotEncoded(Unavailable):
    """An image that can't be encoded when a batch needs it."""

    remedy = "replace or remove the file"

    def __init__(self, dataset: str, sample: "Sample", error: UnreadableImage) -> None:
        self.what = f"the latents of {printable(sample.file)} (dataset {dataset!r})"
        self.told = f"{self.what} can't be computed: {printable(error.reason)}"
        super().__init__(f"{self.told}; {self.remedy}")


@dataclass(frozen=True)
class Sample:
    """A training image.

    `file` is its path below the dataset's folder, `target` its training size (width, height). `key`
    and `fingerprint` are its latents' in the cache. `image` is what to encode where a dataset
    encodes on demand. `references` belong to it, one of each of its dataset's `reference_sets`, and
    so does `mask`, whose entry in the cache holds its weights.
    """

    file: str
    captions: tuple[str, ...]
    target: tuple[int, int]
    key: str
    fingerprint: str
    image: Candidate | None = field(default=None, compare=False, repr=False)
    references: tuple["Sample", ...] = ()
    mask: "Sample | None" = None

    @property
    def bucket(self) -> str:
        """The name of its size, and of its references'; samples of one bucket can share a batch."""
        return "+".join("{}x{}".format(*each.target) for each in (self, *self.references))


@dataclass(frozen=True)
class OnDemand:
    """How a dataset comes to latents that are not cached.

    encode: gives an image's latents, or raises UnreadableImage.
    keeps: whether they are cached then.
    """

    encode: Callable[[Candidate], torch.Tensor]
    keeps: bool


@dataclass(frozen=True)
class NewCrops:
    """Samples that are cropped anew in each epoch.

    samples: the samples of an epoch, in the same order each time.
    sizes: the training sizes (width, height) that crops may have in any epoch, if they change.
    """

    samples: Callable[[int], tuple[Sample, ...]]
    sizes: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """A dataset whose latents are all cached, or are computed on demand.

    `samples` are those of the first epoch. The fields from `repeats` to `is_regularisation_data`
    are those of `config.datasets.ImageDataset`.
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
    on_demand: OnDemand | None = None
    new_crops: NewCrops | None = None
    reference_sets: tuple["PreparedDataset", ...] = ()
    masks: "PreparedMasks | None" = None

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """The (width, height) that samples have in any epoch."""
        later = frozenset() if self.new_crops is None else self.new_crops.sizes
        return {sample.target for sample in self.samples} | later

    def samples_in(self, epoch: int) -> tuple[Sample, ...]:
        """The samples of an epoch, counted from 1; an index means the same image in each."""
        if self.new_crops is None or epoch == 1:
            return self.samples
        return self.new_crops.samples(epoch)

    def latents(self, sample: Sample) -> torch.Tensor:
        """A sample's latents, bf16 [C, H/8, W/8].

        Raises LostEntry if their cache file was lost or damaged since the start, and NotEncoded if
        they are computed on demand and can't be.
        """
        tensors = self.cache.get(sample.key, sample.fingerprint)
        if tensors is not None:
            return tensors["latents"]
        if self.on_demand is None:
            raise LostEntry(
                self.cache, f"the latents of {printable(sample.file)} (dataset {self.id!r})"
            )
        assert sample.image is not None
        try:
            latents = self.on_demand.encode(sample.image)
        except UnreadableImage as error:
            raise NotEncoded(self.id, sample, error) from error
        if self.on_demand.keeps:
            self.cache.put_if_possible(sample.key, sample.fingerprint, {"latents": latents})
        return latents

    def forget(self, epoch: int) -> None:
        """Delete the latents of an epoch that is over, where the next one has crops of its own."""
        if self.new_crops is None:
            return
        over, kept = self._entries(epoch), self._entries(epoch + 1)
        for cache, entries in over.items():
            # an image, or a reference with a crop of its own, may stay as it is
            cache.drop(entries - kept[cache])

    def _entries(self, epoch: int) -> dict[TensorCache, set[tuple[str, str]]]:
        """What is cached of an epoch's samples: (key, fingerprint) by the cache that has it."""
        caches = [self.cache, *(dataset.cache for dataset in self.reference_sets)]
        if self.masks is not None:
            caches.append(self.masks.cache)
        found: dict[TensorCache, set[tuple[str, str]]] = {cache: set() for cache in caches}
        for sample in self.samples_in(epoch):
            parts = [sample, *sample.references, *([sample.mask] if sample.mask else [])]
            for cache, part in zip(caches, parts, strict=True):
                found[cache].add((part.key, part.fingerprint))
        return found


@dataclass(frozen=True)
class PreparedMasks:
    """The masks of a dataset's images: "mask" or "segmentation", as its type says."""

    id: str
    conditioning_type: str
    cache: TensorCache

    def weights(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What a sample's mask says (`pairs.mask_weights`).

        Raises LostEntry if its cache file was lost or damaged since the start, and NotEncoded if
        its image is cropped anew and can't be read.
        """
        mask = sample.mask
        assert mask is not None
        weights = self.cache.get(mask.key, mask.fingerprint)
        if weights is not None:
            return weights
        if mask.image is None:
            raise LostEntry(self.cache, f"the mask {printable(mask.file)} (dataset {self.id!r})")
        try:
            weights = mask_weights(mask.image)
        except UnreadableImage as error:
            raise NotEncoded(self.id, mask, error) from error
        self.cache.put_if_possible(mask.key, mask.fingerprint, weights)
        return weights


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
    """What training needs of the data; `report` prints as the closing table.

    `held_out` are the datasets of the evaluation loss, which nothing is trained on.
    """

    datasets: tuple[PreparedDataset, ...]
    prompts: PromptCache
    report: DataReport
    held_out: tuple[PreparedDataset, ...] = ()
