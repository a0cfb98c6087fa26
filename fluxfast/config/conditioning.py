"""Conditioning datasets: folders whose images belong to the images of another dataset.

A mask or a segmentation says where an image's loss counts, a reference is what FLUX.1-Kontext sees
beside it. Either side names the other: `conditioning_data` on the image dataset, or
`source_dataset_id` on the conditioning one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import field_validator

from fluxfast.config.cache_folders import images_folder
from fluxfast.config.dataset_fields import CaptionStrategy, ImageDataset
from fluxfast.config.generators import Generated
from fluxfast.config.settings import did_you_mean, quoted, shown

ConditioningType = Literal["mask", "segmentation", "reference_strict", "reference_loose"]
MASKS = ("mask", "segmentation")
# sizes that a conditioning dataset has from the dataset that it belongs to
_SOURCE_DECIDES = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
)


class ConditioningDataset(ImageDataset):
    """A folder of masks or references: a file for each image of its source.

    A partner has its image's path below the folder; another image extension will do. The sizes and,
    except with reference_loose, the crops are the source's, and so is what is drawn when.
    """

    dataset_type: Literal["conditioning"]  # type: ignore[assignment]
    """Kind of the entry."""
    conditioning_type: ConditioningType
    """What its images are for: where the loss counts, or what Kontext sees beside the image."""
    source_dataset_id: str | None = None
    """The image dataset that it belongs to, if that doesn't name it as `conditioning_data`."""
    caption_strategy: CaptionStrategy | None = None  # type: ignore[assignment]
    """Where captions come from that take the place of the image's own; null: there are none."""

    @field_validator("instance_prompt")
    @classmethod
    def _no_inherited_prompt(cls, value: str | None) -> str | None:
        return value or None

    @property
    def is_mask(self) -> bool:
        """Whether it weighs the loss; else it is a reference."""
        return self.conditioning_type in MASKS

    @property
    def copies_crops(self) -> bool:
        """Whether its images are cut as the images that they belong to."""
        return self.conditioning_type != "reference_loose"

    @property
    def as_scanned(self) -> "ConditioningDataset":
        """The dataset as its folder is looked at: all of it where crops are the source's.

        What is too small or too narrow is left out of the source, and with it its partner.
        """
        if not self.copies_crops:
            return self
        all_of_it = dict.fromkeys(
            ("minimum_image_size", "minimum_aspect_ratio", "maximum_aspect_ratio")
        )
        return self.model_copy(
            update=all_of_it | {"crop": False, "crop_style": "center", "max_num_samples": None}
        )

    def sized_as(self, source: ImageDataset) -> "ConditioningDataset":
        """The same dataset with the sizes of `source`."""
        return self.model_copy(update={name: getattr(source, name) for name in _SOURCE_DECIDES})


def generated(image: ImageDataset, cache_dir: Path) -> list[ConditioningDataset]:
    """The conditioning datasets that an image dataset has made of its images.

    cache_dir: the run's, where their images and latents are.
    """
    datasets = []
    for generator in image.conditioning:
        id = f"{image.id}_conditioning_{generator.type}"
        origin = Generated(
            kind=generator.type,
            params=generator.params,
            source=image.instance_data_dir,
            captions=generator.captions,
        )
        made_of = [
            str(image.instance_data_dir.absolute()),
            origin.model_dump(mode="json", include={"kind", "params"}),
        ]
        folder = images_folder(cache_dir, "generated", id, made_of)
        values = {
            "id": id,
            "dataset_type": "conditioning",
            "conditioning_type": generator.for_what,
            "source_dataset_id": image.id,
            "instance_data_dir": folder / "images",
            "cache_dir_vae": folder,
            "resolution": image.resolution,
            "resolution_type": image.resolution_type,
            # they are handed over as a table's are
            "caption_strategy": "csv" if generator.captions else None,
            "origin": origin,
        }
        datasets.append(ConditioningDataset.model_validate(values))
    return datasets


def link(
    images: Sequence[ImageDataset], conditions: Sequence[ConditioningDataset], path: object
) -> tuple[dict[str, tuple[ConditioningDataset, ...]], list[str]]:
    """Each image dataset's conditioning datasets by its id, in the file's order, and the problems.

    A dataset of conditions may belong to several of images; it has the sizes of each then.
    """
    by_id = {image.id: image for image in images}
    links: dict[str, set[str]] = {image.id: set() for image in images}
    known = {condition.id: condition for condition in conditions}
    problems = []
    for image in images:
        for name in image.conditioning_data:
            if name in known:
                links[image.id].add(name)
                continue
            what = (
                'is no conditioning dataset: give it a "conditioning_type"'
                if name in by_id
                else f"there is no dataset with this id{did_you_mean(name, known)}"
            )
            problems.append(
                f'{path}: dataset "{image.id}": "conditioning_data" names {shown(name)}: {what}'
            )
    for condition in conditions:
        where = f'{path}: dataset "{condition.id}"'
        source = condition.source_dataset_id
        if source is not None and source not in by_id:
            what = (
                "is a conditioning dataset itself"
                if source in known
                else f"there is no enabled image dataset with this id{did_you_mean(source, by_id)}"
            )
            problems.append(f'{where}: "source_dataset_id" is {shown(source)}: {what}')
        elif source is not None:
            links[source].add(condition.id)
        elif not any(condition.id in image.conditioning_data for image in images):
            problems.append(
                f'{where}: belongs to no image dataset: set its "source_dataset_id" to one of '
                f'{quoted(by_id)}, or name it in the "conditioning_data" of one'
            )
    linked = {
        image.id: tuple(
            condition.sized_as(image) for condition in conditions if condition.id in links[image.id]
        )
        for image in images
    }
    for id, own in linked.items():
        if sum(condition.is_mask for condition in own) > 1:
            masks = quoted(condition.id for condition in own if condition.is_mask)
            problems.append(f'{path}: dataset "{id}": has several masks, {masks}: keep one of them')
    return linked, problems
