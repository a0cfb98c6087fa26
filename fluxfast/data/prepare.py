"""Everything between a dataloader config and the first step: scan folders, fill caches, report.

The encoders are loaded one after the other, each only if the cache lacks something, and freed
before the next one. Where a dataset encodes on demand, the VAE is loaded again while the run
trains, for the first image that a batch needs and the cache lacks.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

from rich.progress import Progress

from fluxfast.config.datasets import DataConfig, ImageDataset
from fluxfast.data.cache import TensorCache
from fluxfast.data.cache_index import owner_of_images
from fluxfast.data.dataset_report import DataReport
from fluxfast.data.encode import EncoderSettings, ImageEncoding, encode_masks, encode_prompts
from fluxfast.data.pairs import Pairing, mask_entry
from fluxfast.data.prepared import (
    NewCrops,
    OnDemand,
    Prepared,
    PreparedDataset,
    PreparedMasks,
    Sample,
)
from fluxfast.data.remarks import Remarks, caption_files, remarks
from fluxfast.data.scan import Candidate, cropped_anew, sizes_of_crops
from fluxfast.data.survey import Survey, SurveyedDataset, started, survey


def prepare(
    data: DataConfig,
    encoders: EncoderSettings,
    *,
    extra_prompts: Iterable[str] = (),
    progress: Progress | None = None,
    encoding: AbstractContextManager[None] | None = None,
    remark: Callable[[Remarks], None] | None = None,
    **options: Any,
) -> Prepared:
    """Prepare the datasets of `data`.

    extra_prompts: texts to encode beside the captions and "", such as validation's.
    progress: where to show progress bars, started by the caller (default: on its own).
    encoding: a context to be in while captions and images are encoded.
    remark: is called with what may surprise in each dataset, before anything is encoded.
    options: those of `survey`, but for `vae_batch_size`, which is the encoders'.

    Raises ValueError naming each dataset that has nothing usable or too little, with the reason and
    what to change, or naming an encoder that can't be loaded.
    """
    with started(progress) as bars:
        found = survey(data, bars, vae_batch_size=encoders.vae_batch_size, **options)
        # before the long part, and again after it: decoding may find damaged images
        found.check()
        for work in found.datasets:
            if remark is not None:
                remark(remarks(work.config, work.scan, caption_files(work.config, work.skip)))
        with encoding or nullcontext():
            return _encoded(data, found, encoders, extra_prompts, bars)


def _encoded(
    data: DataConfig,
    found: Survey,
    encoders: EncoderSettings,
    extra_prompts: Iterable[str],
    bars: Progress,
) -> Prepared:
    """Encode what the caches lack of the surveyed datasets."""
    works = found.datasets
    captions = chain.from_iterable(work.captions for work in works)
    texts = list(dict.fromkeys([*captions, "", *extra_prompts]))
    prompts, texts_encoded = encode_prompts(
        texts,
        found.text_cache,
        encoders,
        batch_size=data.text_embeds.text_encoder_batch_size,
        progress=bars,
    )
    with ImageEncoding(encoders, found.text_cache) as images:
        for work in works:
            _encode_images(work, images, bars)
            _encode_partners(work, images, bars)
        found.check()
        datasets = {work.config.id: _prepared(work, images) for work in works}
    notes = [note for work in works for note in work.all_notes]
    return Prepared(
        tuple(datasets[each.id] for each in data.images),
        prompts,
        DataReport([work.report() for work in works], texts_encoded, notes),
        held_out=tuple(datasets[each.id] for each in data.held_out),
    )


def _encode_images(work: SurveyedDataset, images: ImageEncoding, bars: Progress) -> None:
    entry = functools.partial(images.entry, of_an_epoch=work.config.vae_cache_clear_each_epoch)
    _note_use(work.config, work.cache, map(entry, work.scan.candidates))
    if work.config.encodes_on_demand:
        return
    work.encoded, unreadable = images.encode(
        work.scan.candidates,
        work.cache,
        batch_size=work.config.vae_batch_size,
        max_workers=work.workers,
        progress=bars,
        name=work.config.id,
    )
    work.leave_out(unreadable)


def _encode_partners(work: SurveyedDataset, images: ImageEncoding, bars: Progress) -> None:
    """Encode the references of a dataset and read its masks.

    An image whose partner can't be is left out with it.
    """
    # with a crop of its own in each epoch, an image's partners are read on demand too
    if work.config.vae_cache_clear_each_epoch:
        return
    for pairing in work.pairings:
        partners = list(dict.fromkeys(map(pairing.of, work.scan.candidates)))
        options: dict[str, Any] = {
            "max_workers": work.workers, "progress": bars, "name": pairing.config.id,
        }  # fmt: skip
        entry = mask_entry if pairing.config.is_mask else images.entry
        _note_use(pairing.config, pairing.cache, map(entry, partners))
        if pairing.config.is_mask:
            unreadable = encode_masks(partners, pairing.cache, **options)
        elif _on_demand(work, pairing):
            continue
        else:
            _, unreadable = images.encode(
                partners, pairing.cache, batch_size=pairing.config.vae_batch_size, **options
            )
        work.leave_out_beside(pairing, unreadable)


def _note_use(
    dataset: ImageDataset, cache: TensorCache, entries: Iterable[tuple[str, str]]
) -> None:
    """Have the cache know whose these entries are, and that they are needed now."""
    if not dataset.vae_cache_disable:
        cache.note_use(entries, owner_of_images(dataset.id, dataset.instance_data_dir))


def _on_demand(work: SurveyedDataset, pairing: Pairing) -> bool:
    """Whether the references of a dataset's images are encoded while the run trains."""
    return pairing.config.encodes_on_demand or work.config.vae_cache_clear_each_epoch


def _sample(work: SurveyedDataset, candidate: Candidate, images: ImageEncoding) -> Sample:
    references, mask = [], None
    of_an_epoch = work.config.vae_cache_clear_each_epoch
    for pairing in work.pairings:
        partner = pairing.of(candidate)
        if pairing.config.is_mask:
            entry = mask_entry(partner, of_an_epoch=of_an_epoch)
            mask = _part(partner, entry, of_an_epoch)
        else:
            entry = images.entry(partner, of_an_epoch=of_an_epoch)
            references.append(_part(partner, entry, _on_demand(work, pairing)))
    entry = images.entry(candidate, of_an_epoch=of_an_epoch)
    image = _part(candidate, entry, work.config.encodes_on_demand)
    return replace(image, references=tuple(references), mask=mask)


def _part(candidate: Candidate, entry: tuple[str, str], on_demand: bool) -> Sample:
    """One image of a sample, with what to read where it is read on demand."""
    return Sample(
        file=candidate.file,
        captions=candidate.captions,
        target=candidate.crop_plan.target,
        key=entry[0],
        fingerprint=entry[1],
        image=candidate if on_demand else None,
    )


def _masks(work: SurveyedDataset) -> PreparedMasks | None:
    for pairing in work.pairings:
        if pairing.config.is_mask:
            kind = pairing.config.conditioning_type
            return PreparedMasks(pairing.config.id, kind, pairing.cache)
    return None


def _reference_sets(work: SurveyedDataset, images: ImageEncoding) -> tuple[PreparedDataset, ...]:
    return tuple(
        PreparedDataset(
            id=pairing.config.id,
            samples=(),
            cache=pairing.cache,
            on_demand=OnDemand(images.encode_one, keeps=not pairing.config.vae_cache_disable)
            if _on_demand(work, pairing)
            else None,
        )
        for pairing in work.pairings
        if not pairing.config.is_mask
    )


def _prepared(work: SurveyedDataset, images: ImageEncoding) -> PreparedDataset:
    config = work.config
    samples = tuple(_sample(work, candidate, images) for candidate in work.scan.candidates)
    new_crops = on_demand = None
    if config.encodes_on_demand:
        on_demand = OnDemand(images.encode_one, keeps=not config.vae_cache_disable)
    if config.vae_cache_clear_each_epoch:
        # a batch of the last epoch may be read while the sampler is in the next one
        @functools.lru_cache(maxsize=2)
        def samples_of(epoch: int) -> tuple[Sample, ...]:
            return tuple(
                _sample(
                    work,
                    cropped_anew(
                        config, each, epoch, crop_seed=work.crop_seed, rounding=work.rounding
                    ),
                    images,
                )
                for each in work.scan.candidates
            )

        new_crops = NewCrops(samples_of, sizes_of_crops(config, work.rounding))
    return PreparedDataset(
        id=config.id,
        samples=samples,
        reference_sets=_reference_sets(work, images),
        masks=_masks(work),
        on_demand=on_demand,
        new_crops=new_crops,
        cache=work.cache,
        repeats=work.repeats,
        probability=config.probability,
        train_batch_size=work.batch_size,
        start_epoch=config.start_epoch,
        start_step=config.start_step,
        end_epoch=config.end_epoch,
        end_step=config.end_step,
        timestep_sampling_offset=config.timestep_sampling_offset,
        is_regularisation_data=config.is_regularisation_data,
    )
