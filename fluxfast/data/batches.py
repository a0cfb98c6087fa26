"""Batches of cached latents and embeddings, read ahead in the background."""

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fluxfast.data.captions import pick
from fluxfast.data.pairs import kept_tokens, loss_weight
from fluxfast.data.prepared import Prepared, PreparedDataset, Sample, Unavailable
from fluxfast.data.sampler import Sampler, SampleRef
from fluxfast.text import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """B samples of one bucket of one dataset, on the CPU.

    latents: bf16 [B, C, H/8, W/8], normalised.
    prompt_embeds: T5's embeddings, bf16 [B, L, T5 width].
    pooled_prompt_embeds: CLIP's embedding, bf16 [B, CLIP width].
    attention_mask: bool [B, L], true at the caption's tokens.
    captions: the texts in use, "" where the caption was dropped.
    files: the images, as paths below the dataset's folder.
    dataset: the dataset's id.
    is_regularisation_data: train these towards the base model's own prediction.
    timestep_sampling_offset: the dataset's shift of sampled timesteps.
    references: Kontext's reference images, each bf16 [B, C, h, w] with a size of its own,
        normalised as the latents are.
    loss_mask: the weight of each latent pixel's loss, fp32 [B, 1, H/8, W/8] in 0..1; None: all 1.
    keep_mask: the tokens that no TREAD route may drop, bool [B, H/16 * W/16]; None: any.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    attention_mask: torch.Tensor
    captions: list[str]
    files: list[str]
    dataset: str
    is_regularisation_data: bool
    timestep_sampling_offset: float
    references: tuple[torch.Tensor, ...] = ()
    loss_mask: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None


def caption_rng(seed: int, step: int) -> random.Random:
    """The generator that `load_batch` takes for batch `step` of a run.

    It depends on seed and step alone, so a resumed run draws the same captions.
    """
    return random.Random(f"{seed}:captions:{step}")


def load_batch(
    prepared: Prepared,
    refs: Sequence[SampleRef],
    *,
    caption_dropout_probability: float = 0.0,
    combine_references: bool = False,
    masked_loss_probability: float = 1.0,
    rng: random.Random,
    on_lost: Callable[[Unavailable, Sample], None] = lambda lost, instead: None,
) -> Batch:
    """Read a batch from the caches; `refs` come from one `Sampler.next`.

    What the caches lack is encoded here, if its dataset encodes on demand.

    `rng` picks one caption of each sample, and replaces it by "" with the probability
    `caption_dropout_probability`. Of a dataset's references, a batch has one set, which `rng`
    picks, and whose captions, if it has any, take the place of the images' own; with
    `combine_references` it has all of them. A segmentation weighs the loss with
    `masked_loss_probability`, a mask always.

    Where a cache file was lost or damaged since the start, or an image can't be encoded, another
    sample of the same bucket takes the place of its sample, and `on_lost` is told of both. Raises
    Unavailable naming the first such one if no sample of the bucket can be read.
    """
    known = (*prepared.datasets, *prepared.held_out)
    (dataset,) = [dataset for dataset in known if dataset.id == refs[0].dataset]
    assert all((ref.dataset, ref.epoch) == (dataset.id, refs[0].epoch) for ref in refs)
    samples = dataset.samples_in(refs[0].epoch)
    sets = range(len(dataset.reference_sets))
    if len(sets) > 1 and not combine_references:
        sets = range(first := rng.randrange(len(sets)), first + 1)
    chosen = []
    for ref in refs:
        sample = samples[ref.index]
        caption = pick(_captions(sample, sets, combine_references), rng)
        chosen.append((sample, "" if rng.random() < caption_dropout_probability else caption))
    read = [
        _read(prepared, dataset, samples, sample, caption, sets, on_lost)
        for sample, caption in chosen
    ]
    masks = dataset.masks
    weighs = masks is not None and (
        masks.conditioning_type == "mask" or rng.random() < masked_loss_probability
    )
    embeds = [each.embeds for each in read]
    return Batch(
        latents=torch.stack([each.latents for each in read]),
        prompt_embeds=torch.stack([each["prompt_embeds"] for each in embeds]),
        pooled_prompt_embeds=torch.stack([each["pooled_prompt_embeds"] for each in embeds]),
        attention_mask=torch.stack([each["attention_mask"] for each in embeds]),
        captions=[each.caption for each in read],
        files=[each.file for each in read],
        dataset=dataset.id,
        is_regularisation_data=dataset.is_regularisation_data,
        timestep_sampling_offset=dataset.timestep_sampling_offset,
        references=tuple(map(torch.stack, zip(*(each.references for each in read), strict=True))),
        loss_mask=torch.stack([loss_weight(each.mask, masks.conditioning_type) for each in read])
        if masks is not None and weighs
        else None,
        keep_mask=torch.stack([kept_tokens(each.mask) for each in read])
        if masks is not None
        else None,
    )


def _captions(sample: Sample, sets: Sequence[int], combined: bool) -> tuple[str, ...]:
    """What a sample may be called beside the references of these sets."""
    of_references = sample.references[sets[0]].captions if sets and not combined else ()
    return of_references or sample.captions


class _Read(NamedTuple):
    file: str
    caption: str
    latents: torch.Tensor
    embeds: dict[str, torch.Tensor]
    references: list[torch.Tensor]
    mask: dict[str, torch.Tensor]


def _read(
    prepared: Prepared,
    dataset: PreparedDataset,
    samples: Sequence[Sample],
    wanted: Sample,
    caption: str,
    sets: Sequence[int],
    on_lost: Callable[[Unavailable, Sample], None],
) -> _Read:
    """Read a sample with that caption, or else the next of its bucket in `samples` that can be.

    The other sample comes with a caption of its own, but "" stays "".
    """
    try:
        return _read_one(prepared, dataset, wanted, caption, sets)
    except Unavailable as error:
        lost = error
    bucket = [sample for sample in samples if sample.bucket == wanted.bucket]
    after = bucket.index(wanted) + 1
    for sample in (*bucket[after:], *bucket[: after - 1]):
        try:
            read = _read_one(prepared, dataset, sample, caption and sample.captions[0], sets)
        except Unavailable:
            continue
        on_lost(lost, sample)
        return read
    raise lost


def _read_one(
    prepared: Prepared,
    dataset: PreparedDataset,
    sample: Sample,
    caption: str,
    sets: Sequence[int],
) -> _Read:
    # the caption first: many images may share it, so reading their latents would be in vain
    embeds = prepared.prompts.get(caption)
    references = [dataset.reference_sets[i].latents(sample.references[i]) for i in sets]
    mask = dataset.masks.weights(sample) if dataset.masks is not None else {}
    return _Read(sample.file, caption, dataset.latents(sample), embeds, references, mask)


class BatchLoader:
    """An endless iterator of a run's batches, of which a thread reads the next few ahead.

    `epoch` and `state_dict()` belong to the batch handed out last, however far the thread has read.
    A sampler that loads this state, in a loader that starts at `step`, goes on with the batch after
    it.
    """

    def __init__(
        self,
        prepared: Prepared,
        sampler: Sampler,
        *,
        step: int = 0,
        read_ahead: int = 2,
        then: Callable[[Batch, int], Any] | None = None,
        **options: Any,
    ) -> None:
        """`step` is the number of batches that the run has used so far; options: `load_batch`'s.

        `then` is called in the thread with each batch and its number, counted from 0 over the run;
        what it returns is handed out in the batch's place. Captions follow the sampler's seed.
        """
        self._then = then or (lambda batch, number: batch)
        self.step = step
        self.epoch = sampler.epoch
        self._prepared, self._sampler = prepared, sampler
        self._options = options
        self._state = sampler.state_dict()
        self._next_read = step
        self._epoch_read = sampler.epoch
        self._told: set[str] = set()
        # one thread only: the sampler must be asked for its steps in order
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fluxfast-batches")
        self._ahead: deque[Future[tuple[Any, int, dict]]] = deque(
            self._submit() for _ in range(read_ahead)
        )

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> Any:
        self._ahead.append(self._submit())
        batch, self.epoch, self._state = self._ahead.popleft().result()
        self.step += 1
        return batch

    def upcoming(self) -> Callable[[], Any]:
        """A function that waits for the next batch and returns it, without taking it.

        Another thread may call it, also after the batch has been handed out.
        """
        read = self._ahead[0]
        return lambda: read.result()[0]

    @property
    def ends_epoch(self) -> bool:
        """Whether the batch handed out last is the last of its epoch; waits for the next one.

        False where the next one can't be read, which asking for it tells.
        """
        following = self._ahead[0]
        return following.exception() is None and following.result()[1] > self.epoch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state after the batch handed out last."""
        return self._state

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> Future[tuple[Any, int, dict]]:
        step = self._next_read
        self._next_read += 1
        return self._pool.submit(self._read, step)

    def _read(self, step: int) -> tuple[Any, int, dict]:
        refs = self._sampler.next(step)
        if self._sampler.epoch > self._epoch_read:
            for dataset in self._prepared.datasets:
                dataset.forget(self._epoch_read)
            self._epoch_read = self._sampler.epoch
        batch = load_batch(
            self._prepared,
            refs,
            **self._options,
            rng=caption_rng(self._sampler.seed, step),
            on_lost=self._tell,
        )
        return self._then(batch, step), self._sampler.epoch, self._sampler.state_dict()

    def _tell(self, lost: Unavailable, instead: Sample) -> None:
        if lost.what not in self._told:
            self._told.add(lost.what)
            logger.warning(
                "%s: %s and others of its size are trained on in their place; %s",
                lost.told,
                printable(instead.file),
                lost.remedy,
            )
