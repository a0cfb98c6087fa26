"""Which file of a conditioning dataset belongs to which image, and what it becomes for a batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import torch
import torch.nn.functional as F

from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.data.buckets import apply
from fluxfast.data.cache import TensorCache, fingerprint
from fluxfast.data.images import to_tensor
from fluxfast.data.scan import Candidate, Scan, load_unchanged
from fluxfast.text import printable

# pixels of an image for each of its latents, and latents for each token, each way
_PIXELS, _LATENTS = 8, 2
# raise it when the same mask comes to give other weights
_MASK_VERSION = 1
# a partner's width / height may differ from its image's by so much: a resized copy rounds its sides
_ASPECT_TOLERANCE = 0.02
_NAMED = 20


@dataclass(frozen=True)
class Pairing:
    """A conditioning dataset beside the images of its source.

    source: the id of that dataset.
    partners: by the image's file, what belongs to it, cut as it will be.
    missing: images without a partner, by their file, and what is known of the reason.
    unfit: images whose partner has another shape, by their file, and both sizes.
    orphans: files that belong to no image.
    other_extension: how many partners have another extension than their image.
    """

    source: str
    config: ConditioningDataset
    cache: TensorCache
    partners: Mapping[str, Candidate]
    missing: Mapping[str, str]
    unfit: Mapping[str, str]
    orphans: tuple[str, ...] = ()
    other_extension: int = 0

    def fits(self, image: Candidate) -> bool:
        """Whether the image has a partner that a run can use."""
        return image.file in self.partners and image.file not in self.unfit

    def of(self, image: Candidate) -> Candidate:
        """The partner of an image, which may have been cropped anew."""
        partner = self.partners[image.file]
        return replace(partner, crop_plan=image.crop_plan) if self.config.copies_crops else partner

    def name(self, partner: Candidate) -> str:
        """What a partner is called beside those of other datasets."""
        return f"{self.config.id}/{partner.file}"

    def problems(self) -> Iterable[str]:
        """Lines on images without a partner that fits, which a run can't go without."""
        where, kind = f'dataset "{self.config.id}"', self.config.conditioning_type
        if self.missing:
            yield (
                f'{where}: {_count(len(self.missing), "image")} of "{self.source}" without a '
                f"{kind} of the same name in {self.config.instance_data_dir}: "
                f"{_some(with_reasons(self.missing), _NAMED)}"
            )
        if self.unfit:
            yield (
                f"{where}: {_count(len(self.unfit), 'file')} of another shape than the image of "
                f'"{self.source}" whose crop they are to have (reference_loose crops a reference '
                f"by itself): {_some(with_reasons(self.unfit), _NAMED)}"
            )

    def notes(self) -> Iterable[str]:
        """Lines for the user."""
        id = self.config.id
        if self.other_extension:
            number = self.other_extension
            told = "1 file has" if number == 1 else f"{number} files have"
            yield f"{id}: {told} another extension than the image that it belongs to"
        if self.orphans:
            number = len(self.orphans)
            told = "1 file belongs" if number == 1 else f"{number} files belong"
            yield f"{id}: {told} to no image that is trained on ({_some(self.orphans, 3)})"


def pair(
    source: str, images: Scan, config: ConditioningDataset, cache: TensorCache, own: Scan
) -> Pairing:
    """Find each image's partner: the file of the same path below its folder.

    source: id of the images' dataset. own: the scan of the conditioning dataset. Where there is no
    such file, one of another extension is taken, if it is the only one.
    """
    exact = {candidate.file: candidate for candidate in own.candidates}
    by_stem: dict[str, list[Candidate]] = {}
    for candidate in own.candidates:
        by_stem.setdefault(_stem(candidate.file), []).append(candidate)
    left_out = {_stem(skipped.file): skipped for skipped in own.skipped}
    partners, missing, unfit, others = {}, {}, {}, 0
    for image in images.candidates:
        alike = by_stem.get(_stem(image.file), [])
        partner = exact.get(image.file) or (alike[0] if len(alike) == 1 else None)
        if partner is None:
            skipped = left_out.get(_stem(image.file))
            names = " and ".join(printable(each.file) for each in alike)
            missing[image.file] = (
                f"{printable(skipped.file)}: {skipped.detail or skipped.reason}"
                if skipped
                else f"either {names}?" * bool(alike)
            )
            continue
        others += partner.file != image.file
        if config.copies_crops and not _same_shape(image.size, partner.size):
            unfit[image.file] = f"{_size(image.size)} and {_size(partner.size)}"
        partners[image.file] = partner
    taken = {partner.file for partner in partners.values()}
    orphans = tuple(c.file for c in own.candidates if c.file not in taken)
    return Pairing(source, config, cache, partners, missing, unfit, orphans, others)


def with_reasons(images: Mapping[str, str]) -> list[str]:
    """Each image's file, with its reason in brackets if there is one."""
    return [printable(file) + (f" ({reason})" if reason else "") for file, reason in images.items()]


def mask_entry(mask: Candidate, *, of_an_epoch: bool = False) -> tuple[str, str]:
    """What a cache knows a mask's weights by: (key, hash of its content and its crop)."""
    plan = mask.crop_plan
    return mask.key(of_an_epoch=of_an_epoch), fingerprint(
        "mask", _MASK_VERSION, mask.sha256, plan.intermediary, plan.crop_box
    )


def mask_weights(mask: Candidate) -> dict[str, torch.Tensor]:
    """What a mask says of each latent pixel, fp32 [H/8, W/8] in 0..1.

    `red` is the mean of the first channel over the latent's pixels, `mean` that of all three.
    Raises UnreadableImage if the file can't be decoded, or has changed since the scan.
    """
    img = load_unchanged(mask)
    # the resize's overshoot is cut off by the 8 bits of the image
    pixels = (to_tensor(apply(img, mask.crop_plan)) + 1) / 2
    weights = F.avg_pool2d(pixels, _PIXELS)
    return {"red": weights[0].contiguous(), "mean": weights.mean(dim=0)}


def loss_weight(weights: Mapping[str, torch.Tensor], conditioning_type: str) -> torch.Tensor:
    """The weight of each latent pixel's loss, fp32 [1, H/8, W/8].

    A mask weighs by its first channel, a segmentation by yes (brighter than half) or no.
    """
    if conditioning_type == "segmentation":
        return (weights["mean"] > 0.5).float()[None]
    return weights["red"][None]


def kept_tokens(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tokens that a mask keeps, bool [H/16 * W/16]: those that are brighter than half."""
    return (F.avg_pool2d(weights["mean"][None], _LATENTS)[0] > 0.5).flatten()


def _stem(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(""))


def _same_shape(image: tuple[int, int], partner: tuple[int, int]) -> bool:
    one, other = image[0] / image[1], partner[0] / partner[1]
    return abs(one - other) <= _ASPECT_TOLERANCE * one


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _some(names: Iterable[str], most: int) -> str:
    known = [printable(name) for name in names]
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more
