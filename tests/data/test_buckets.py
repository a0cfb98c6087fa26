"""Target sizes, crops and rejections of images, as SimpleTuner's except where documented."""

import random

import numpy as np
import pytest
from data_fixtures import photo
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxfast.data.buckets import (
    CropPlan,
    apply,
    crop_rng,
    plan_crop,
    rejection,
    round64,
    target_size,
    within_upscaling,
)

GOLDEN = [
    (512, (1920, 1080), (704, 384), (704, 396), "1.83"),
    (512, (4000, 3000), (576, 448), (597, 448), "1.29"),
    (512, (3000, 2000), (640, 448), (672, 448), "1.43"),
    (512, (2048, 858), (768, 320), (768, 322), "2.4"),
    (512, (1000, 1001), (512, 512), (512, 513), "1.0"),
    (768, (1920, 1080), (1024, 576), (1024, 576), "1.78"),
    (768, (4000, 3000), (896, 640), (896, 672), "1.4"),
    (768, (3000, 2000), (960, 640), (960, 640), "1.5"),
    (768, (2048, 858), (1216, 512), (1222, 512), "2.38"),
    (1024, (1920, 1080), (1344, 768), (1365, 768), "1.75"),
    (1024, (4000, 3000), (1152, 896), (1194, 896), "1.29"),
    (1024, (3000, 2000), (1280, 832), (1280, 853), "1.54"),
    (1024, (2048, 858), (1600, 640), (1600, 670), "2.5"),
    (1024, (3000, 4000), (896, 1152), (896, 1194), "0.78"),
    # mirrors of the above, by the same rule
    (1024, (1080, 1920), (768, 1344), (768, 1365), "0.57"),
    (1024, (2000, 3000), (832, 1280), (853, 1280), "0.65"),
    (1024, (858, 2048), (640, 1600), (670, 1600), "0.4"),
    (512, (1080, 1920), (384, 704), (396, 704), "0.55"),
]


def plan_for(size, **options):
    return plan_crop(size, **{"resolution": 512, "rng": random.Random(0)} | options)


@pytest.mark.parametrize(("edge", "size", "target", "intermediary", "bucket"), GOLDEN)
def test_golden_sizes(edge, size, target, intermediary, bucket):
    planned = plan_for(size, resolution=edge)
    assert (planned.target, planned.intermediary, planned.bucket) == (target, intermediary, bucket)
    # the same area given in megapixels
    assert plan_for(size, resolution=edge**2 / 1e6, resolution_type="area") == planned


def test_round64_ties_go_to_the_even_multiple():
    assert [round64(value) for value in (0, 31, 96, 160, 224, 97, 159)] == [
        64,
        64,
        128,
        128,
        256,
        128,
        128,
    ]


def test_an_area_of_round_megapixels():
    assert target_size(1.0, 1.0, "area") == (1024, 1024)
    assert target_size(1.0, 0.25, "area") == (512, 512)


def test_pixel_resolution_is_the_shorter_side():
    assert plan_for((1920, 1080), resolution=1024, resolution_type="pixel").target == (1792, 1024)
    assert plan_for((1080, 1920), resolution=1024, resolution_type="pixel").target == (1024, 1856)
    assert plan_for((700, 700), resolution=500, resolution_type="pixel").target == (512, 512)


def test_square_crop_covers_the_square_with_the_shorter_side():
    planned = plan_for((1920, 1080), crop=True, crop_style="center")
    assert (planned.target, planned.intermediary, planned.bucket) == ((512, 512), (910, 512), "1.0")
    assert planned.crop_box == (199, 0, 711, 512)


def test_quickstart_square_crop():
    # the quickstart's first dataset: maximum_image_size = target_downsample_size = resolution
    planned = plan_for(
        (1920, 1080),
        crop=True,
        crop_style="center",
        maximum_image_size=512,
        target_downsample_size=512,
    )
    assert (planned.target, planned.intermediary) == ((512, 512), (910, 512))


def test_crop_after_downsampling_only_above_the_maximum():
    options = {
        "crop": True,
        "crop_style": "center",
        "maximum_image_size": 1536,
        "target_downsample_size": 1024,
    }
    assert plan_for((4000, 3000), **options).intermediary == (1194, 896)
    assert plan_for((1600, 1200), **options).intermediary == (682, 512)
    # without both keys there is no such step
    assert plan_for((4000, 3000), crop=True, maximum_image_size=1536).intermediary == (682, 512)


@pytest.mark.parametrize(
    ("style", "box"), [("center", (66, 0)), ("centre", (66, 0)), ("corner", (0, 0))]
)
def test_crop_styles(style, box):
    assert plan_for((1000, 794), crop=True, crop_style=style).crop_box[:2] == box


def test_the_overhang_is_cut_by_crop_style_without_crop_too():
    assert plan_for((1920, 1080), crop_style="center").crop_box == (0, 6, 704, 390)
    tops = {plan_for((1920, 1080), rng=random.Random(i)).crop_box[1] for i in range(200)}
    assert tops == set(range(13))


def test_crop_aspects():
    def target(aspect, **options):
        return plan_for((1920, 1080), crop=True, crop_aspect=aspect, **options).target

    assert target("preserve") == (704, 384)
    assert target("closest", crop_aspect_buckets=[0.5, 1.0, 1.5]) == (640, 448)
    portrait_only = [{"aspect": 0.5, "weight": 1.0}, {"aspect": 1.5, "weight": 0.0}]
    assert {
        target("random", crop_aspect_buckets=portrait_only, rng=random.Random(i)) for i in range(20)
    } == {(384, 704)}
    both = {
        target("random", crop_aspect_buckets=[1.0, 0.5], rng=random.Random(i)) for i in range(20)
    }
    assert both == {(512, 512), (384, 704)}
    with pytest.raises(ValueError, match="'closest' needs crop_aspect_buckets"):
        target("closest")


def test_buckets_that_enlarge_too_much_are_left_out():
    def within(size, buckets, threshold, **options):
        return within_upscaling(size, buckets, threshold, resolution=1024, **options)

    # SimpleTuner's documented images: 850 pixels to 1024 are 20 %, 256 to 1024 are 300 %
    assert within((850, 850), [1.0], 0.2, resolution_type="pixel") == [1.0]
    assert within((850, 850), [1.0], 0.19, resolution_type="pixel") == []
    assert within((256, 256), [1.0, 0.5, 2.0], 0.2, resolution_type="pixel") == []
    # targets are 1024x1024, 704x1472 and 1472x704
    weighted = [{"aspect": aspect, "weight": 0.5} for aspect in (1.0, 0.5, 2.0)]
    assert within((1000, 1250), weighted, 0.2) == weighted[:2]
    assert within((1000, 1250), weighted, 0.0) == []
    assert within((1024, 1472), weighted, 0.0) == weighted[:2]


def test_random_crops_follow_seed_dataset_and_file():
    def box(*key):
        return plan_for((1920, 1080), crop=True, rng=crop_rng(*key)).crop_box

    assert box(1, "cats", "a.png") == box(1, "cats", "a.png")
    others = {
        box(1, "cats", "a.png"),
        box(2, "cats", "a.png"),
        box(1, "dogs", "a.png"),
        box(1, "cats", "b.png"),
    }
    assert len(others) == 4


sizes = st.tuples(st.integers(1, 9000), st.integers(1, 9000))


@settings(max_examples=300, deadline=None)
@given(
    size=sizes,
    resolution=st.sampled_from([256, 512, 1000, 1024]),
    resolution_type=st.sampled_from(["pixel", "pixel_area"]),
    crop=st.booleans(),
    crop_aspect=st.sampled_from(["square", "preserve", "random", "closest"]),
    maximum=st.sampled_from([None, 512, 2048]),
    seed=st.integers(0, 9),
)
def test_any_image_gets_a_crop_inside_an_undistorted_image(
    size, resolution, resolution_type, crop, crop_aspect, maximum, seed
):
    planned = plan_crop(
        size,
        resolution=resolution,
        resolution_type=resolution_type,
        crop=crop,
        crop_aspect=crop_aspect,
        crop_aspect_buckets=[0.5, 1.0, 1.5],
        maximum_image_size=maximum,
        target_downsample_size=maximum,
        rng=random.Random(seed),
    )
    left, top, right, bottom = planned.crop_box
    assert (right - left, bottom - top) == planned.target
    assert left >= 0
    assert top >= 0
    assert right <= planned.intermediary[0]
    assert bottom <= planned.intermediary[1]
    assert planned.target[0] % 64 == planned.target[1] % 64 == 0
    # whole pixels: each side is within 2 pixels of the size's own proportions, seen from one side
    # or the other
    (width, height), ratio = planned.intermediary, size[0] / size[1]
    assert abs(width - height * ratio) <= 2 * max(1, ratio) or abs(
        height - width / ratio
    ) <= 2 * max(1, 1 / ratio)


def test_limits_and_their_reasons():
    def why(size, **options):
        return rejection(size, **options)

    assert why((512, 512), minimum_image_size=512) is None
    assert why((512, 511), minimum_image_size=512) == "smaller than minimum_image_size 512"
    # an area is enough, unless a square is cut from it
    assert why((400, 800), minimum_image_size=512) is None
    assert (
        why((400, 800), minimum_image_size=512, square_crop=True)
        == "smaller than minimum_image_size 512"
    )
    assert why((512, 512), minimum_image_size=0.262144, resolution_type="area") is None
    assert why((512, 511), minimum_image_size=0.262144, resolution_type="area") is not None
    assert why((768, 1024), minimum_image_size=1024, resolution_type="pixel") is not None
    assert why((1760, 1024), minimum_image_size=1024, resolution_type="pixel") is None
    assert why((1000, 400), maximum_aspect_ratio=2.5) is None
    assert why((1001, 396), maximum_aspect_ratio=2.5) == "wider than maximum_aspect_ratio 2.5"
    assert why((396, 1001), minimum_aspect_ratio=0.5) == "narrower than minimum_aspect_ratio 0.5"
    assert why((1, 1)) is None


def test_apply_resizes_and_crops():
    img = photo(200, 100)
    result = apply(
        img,
        CropPlan(target=(64, 64), intermediary=(128, 64), crop_box=(64, 0, 128, 64), bucket="1.0"),
    )
    assert result.size == (64, 64)
    # the right half of the image, at 64/100 of its size
    expected = np.asarray(img.crop((100, 0, 200, 100)).resize((64, 64))).astype(int)
    assert np.abs(np.asarray(result).astype(int) - expected).mean() < 2
