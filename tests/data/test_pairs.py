"""Conditioning datasets: partners found by name, cut as their image, and handed out in batches."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_fixtures import photo
from pair_cases import conditions, copy_shapes, linked
from PIL import Image
from prepare_cases import config, rendered

from fluxfast.data.batches import caption_rng, load_batch
from fluxfast.data.buckets import apply
from fluxfast.data.images import load_image
from fluxfast.data.prepare import prepare
from fluxfast.data.sampler import SampleRef


def left_half(size, _):
    """White at the left, black at the right; blue is everywhere, which a mask does not read."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    pixels[..., 2] = 255
    return Image.fromarray(pixels)


def first_batch(prepared, bucket=None, **options):
    (dataset,) = prepared.datasets
    indices = [i for i, s in enumerate(dataset.samples) if bucket in (None, s.bucket)]
    refs = [SampleRef(dataset.id, i) for i in indices[:2]]
    return load_batch(prepared, refs, rng=caption_rng(0, 0), **options)


@pytest.mark.usefixtures("folder", "no_collection")
@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_a_mask_is_cut_as_its_image(tmp_path, settings, kind):
    copy_shapes(tmp_path, kind, left_half, scale=2)
    data = linked(tmp_path, *conditions(tmp_path, kind), crop=True, crop_style="random")
    prepared = prepare(data, settings, crop_seed=3)
    batch = first_batch(prepared)
    assert batch.latents.shape[-2:] == batch.loss_mask.shape[-2:] == (16, 16)
    assert batch.loss_mask.shape == (2, 1, 16, 16) and batch.loss_mask.dtype == torch.float32
    # by hand: the scan's plan, applied to the mask's own file
    from fluxfast.data.cache import TensorCache
    from fluxfast.data.scan import scan

    found = scan(data.images[0], TensorCache(tmp_path / "again"), crop_seed=3)
    plans = {c.file: c.crop_plan for c in found.candidates}
    for file, weight, kept in zip(batch.files, batch.loss_mask, batch.keep_mask, strict=True):
        pixels = np.asarray(apply(load_image(tmp_path / kind / file), plans[file])) / 255
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
        red = F.interpolate(pixels[None, :1], size=(16, 16), mode="area")[0]
        mean = pixels.mean(dim=0)[None, None]
        if kind == "mask":
            # 8-bit pixels in fp32
            torch.testing.assert_close(weight.double(), red, rtol=0, atol=1e-6)
            assert 0 < weight.mean() < 1
        else:
            expected = F.interpolate(mean, size=(16, 16), mode="area")[0] > 0.5
            assert torch.equal(weight.bool(), expected)
        tokens = F.interpolate(mean, size=(8, 8), mode="area")[0, 0] > 0.5
        assert torch.equal(kept, tokens.flatten())
    assert batch.references == ()


@pytest.mark.usefixtures("folder", "no_collection")
def test_a_segmentation_weighs_as_often_as_it_is_told(tmp_path, settings):
    for kind in ("mask", "segmentation"):
        copy_shapes(tmp_path, kind, left_half)
    prepared = prepare(linked(tmp_path, *conditions(tmp_path, "segmentation")), settings)
    weighed = [
        load_batch(
            prepared,
            [SampleRef("set0", 0)],
            rng=random.Random(step),
            masked_loss_probability=0.25,
        )
        for step in range(400)
    ]
    # four standard errors of 400 draws are 0.087
    assert 0.16 < np.mean([batch.loss_mask is not None for batch in weighed]) < 0.34
    assert all(batch.keep_mask is not None for batch in weighed)
    masked = prepare(linked(tmp_path, *conditions(tmp_path, "mask")), settings)
    assert first_batch(masked, masked_loss_probability=0.0).loss_mask is not None


@pytest.mark.usefixtures("folder", "no_collection")
def test_references_are_encoded_as_images_are(tmp_path, settings):
    """A strict one has its image's crop, a loose one its own bucket; both lie in their caches."""
    copy_shapes(tmp_path, "reference_strict", lambda size, stem: photo(*size, seed=len(stem)))
    copy_shapes(tmp_path, "reference_loose", lambda size, stem: photo(size[1] * 3, size[1], 7))
    own = conditions(tmp_path, "reference_strict", "reference_loose")
    data = linked(tmp_path, *own, crop=True, crop_style="center")
    prepared = prepare(data, settings)
    (dataset,) = prepared.datasets
    assert {sample.bucket for sample in dataset.samples} == {"128x128+128x128+192x64"}
    both = first_batch(prepared, combine_references=True)
    assert [tuple(reference.shape[1:]) for reference in both.references] == [
        (16, 16, 16),
        (16, 8, 24),
    ]
    # the same file as an image of its own has the same latents
    alone = prepare(
        config(tmp_path, instance_data_dir=tmp_path / "reference_strict", crop=True,
               crop_style="center", cache_dir_vae=tmp_path / "alone"),
        settings,
    )  # fmt: skip
    assert torch.equal(both.references[0], first_batch(alone).latents)
    drawn = {
        tuple(
            load_batch(prepared, [SampleRef("set0", 0)], rng=caption_rng(1, step))
            .references[0]
            .shape
        )
        for step in range(20)
    }
    assert drawn == {(1, 16, 16, 16), (1, 16, 8, 24)}
    # a second start has nothing to encode
    again = prepare(data, settings)
    assert torch.equal(
        first_batch(again, combine_references=True).references[1], both.references[1]
    )


@pytest.mark.usefixtures("folder", "no_collection")
def test_a_references_caption_takes_the_place_of_the_images(tmp_path, settings):
    for kind in ("reference_strict", "reference_loose"):
        copy_shapes(tmp_path, kind, lambda size, stem: photo(*size))
    told = conditions(
        tmp_path,
        "reference_strict",
        caption_strategy="instanceprompt",
        instance_prompt="make it red",
    )
    prepared = prepare(linked(tmp_path, *told), settings)
    assert first_batch(prepared).captions == ["make it red"] * 2
    assert "make it red" not in first_batch(prepared, combine_references=True).captions
    silent = prepare(linked(tmp_path, *conditions(tmp_path, "reference_loose")), settings)
    assert "make it red" not in first_batch(silent).captions


@pytest.mark.usefixtures("folder", "no_collection")
def test_every_missing_or_unfit_partner_is_named_before_anything_is_encoded(
    tmp_path, settings, encoders
):
    copy_shapes(tmp_path, "mask", left_half)
    (tmp_path / "mask" / "wide_0.png").unlink()
    (tmp_path / "mask" / "wide_1.png").write_bytes(b"no image")
    left_half((100, 100), "").save(tmp_path / "mask" / "wide_2.png")
    (tmp_path / "mask" / "sub" / "tall_0.png").unlink()
    data = linked(tmp_path, *conditions(tmp_path, "mask"))
    with pytest.raises(ValueError, match="without a mask of the same name") as raised:
        prepare(data, settings)
    text = str(raised.value)
    for part in ("3 images", "wide_0.png", "wide_1.png (wide_1.png: not an image", "tall_0.png"):
        assert part in text
    assert "1 file of another shape" in text and "wide_2.png (200x100 and 100x100)" in text
    assert encoders == ([], [], 0)


@pytest.mark.usefixtures("folder", "no_collection")
def test_another_extension_will_do_and_files_of_no_image_are_told(tmp_path, settings):
    copy_shapes(tmp_path, "mask", left_half)
    for name in ("wide_0", "wide_1"):
        (tmp_path / "mask" / f"{name}.png").unlink()
        left_half((200, 100), "").save(tmp_path / "mask" / f"{name}.bmp")
    left_half((64, 64), "").save(tmp_path / "mask" / "nobody.png")
    report = rendered(prepare(linked(tmp_path, *conditions(tmp_path, "mask")), settings).report)
    assert "mask: 2 files have another extension than the image" in report
    assert "mask: 1 file belongs to no image that is trained on (nobody.png)" in report


@pytest.mark.usefixtures("folder", "no_collection")
def test_new_crops_in_each_epoch_reach_masks_and_strict_references(tmp_path, settings):
    copy_shapes(tmp_path, "mask", left_half)
    copy_shapes(tmp_path, "reference_strict", lambda size, stem: photo(*size, seed=3))
    own = conditions(tmp_path, "mask", "reference_strict")
    data = linked(tmp_path, *own, crop=True, crop_style="random", vae_cache_clear_each_epoch=True)
    prepared = prepare(data, settings)
    (dataset,) = prepared.datasets
    # a wide one, whose crops lie side by side
    by_epoch = [
        load_batch(prepared, [SampleRef("set0", 2, epoch)], rng=caption_rng(0, 0))
        for epoch in (1, 2)
    ]
    one, two = by_epoch
    assert not torch.equal(one.latents, two.latents)
    assert not torch.equal(one.loss_mask, two.loss_mask)
    assert not torch.equal(one.references[0], two.references[0])
    caches = [tmp_path / "cache" / name for name in ("vae0", "mask", "reference_strict")]
    assert [len(list(cache.glob("*.safetensors"))) for cache in caches] == [2, 2, 2]
    dataset.forget(1)
    assert [len(list(cache.glob("*.safetensors"))) for cache in caches] == [1, 1, 1]
