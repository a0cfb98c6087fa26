"""Everything between a dataloader config and the first step: scan folders, fill caches, report.

The encoders are loaded one after the other, each only if the cache lacks something, and freed
before the next one. Where a dataset encodes on demand, the VAE is loaded again while the run
trains, for the first image that a batch needs and the cache lacks.
"""

import functools
from collections.abc import Iterable
from itertools import chain
from typing import Any

from rich.progress import Progress

from fluxfast.config.datasets import DataConfig
from fluxfast.data.dataset_report import DataReport
from fluxfast.data.encode import EncoderSettings, ImageEncoding, encode_prompts
from fluxfast.data.prepared import NewCrops, OnDemand, Prepared, PreparedDataset, Sample
from fluxfast.data.scan import Candidate, cropped_anew, sizes_of_crops
from fluxfast.data.survey import SurveyedDataset, started, survey


def prepare(
    data: DataConfig,
    encoders: EncoderSettings,
    *,
    extra_prompts: Iterable[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Prepared:
    """Prepare the datasets of `data`.

    extra_prompts: texts to encode beside the captions and "", such as validation's.
    progress: where to show progress bars, started by the caller (default: on its own).
    options: those of `survey`, but for `vae_batch_size`, which is the encoders'.

    Raises ValueError naming each dataset that has nothing usable or too little, with the reason and
    what to change, or naming an encoder that can't be loaded.
    """
    with started(progress) as bars:
        found = survey(data, bars, vae_batch_size=encoders.vae_batch_size, **options)
        works = found.datasets
        # before the long part, and again after it: decoding may find damaged images
        found.check()
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
            found.check()
            datasets = tuple(_prepared(work, images) for work in works)
    notes = [note for work in works for note in work.all_notes]
    return Prepared(
        datasets,
        prompts,
        DataReport([work.report() for work in works], len(texts), texts_encoded, notes),
    )


def _encode_images(work: SurveyedDataset, images: ImageEncoding, bars: Progress) -> None:
    if work.config.encodes_on_demand:
        return
    wanted = [(work.key(candidate), candidate) for candidate in work.scan.candidates]
    work.encoded, unreadable = images.encode(
        wanted,
        work.cache,
        batch_size=work.config.vae_batch_size,
        max_workers=work.workers,
        progress=bars,
        name=work.config.id,
    )
    work.leave_out(unreadable)


def _sample(work: SurveyedDataset, candidate: Candidate, images: ImageEncoding) -> Sample:
    return Sample(
        file=candidate.file,
        captions=candidate.captions,
        target=candidate.crop_plan.target,
        key=work.key(candidate),
        fingerprint=images.fingerprint(candidate),
        image=candidate if work.config.encodes_on_demand else None,
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
