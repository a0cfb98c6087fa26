"""Generated conditioning datasets: what each generator makes, and that it is made once."""

import json
import random

import numpy as np
import pytest
import torch
from data_fixtures import photo
from PIL import Image
from prepare_cases import rendered

from fluxfast.config.datasets import DatasetDefaults, load_data_config
from fluxfast.config.generators import Edges, JpegArtifacts, RandomMask, Superresolution
from fluxfast.config.settings import ConfigError
from fluxfast.data import generators
from fluxfast.data.batches import caption_rng, load_batch
from fluxfast.data.prepare import prepare
from fluxfast.data.sampler import SampleRef


def sharpness(img):
    pixels = np.asarray(img.convert("L"), dtype=float)
    return np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean()


@pytest.fixture
def checks():
    """A sharp image: a checkerboard of 4 pixels, with a colour to each side."""
    y, x = np.mgrid[:96, :160]
    board = ((x // 4 + y // 4) % 2 * 255).astype(np.uint8)
    return Image.fromarray(np.stack([board, 255 - board, (x * 255 // 160).astype(np.uint8)], -1))


def test_superresolution_takes_the_fine_detail(checks):
    rng = random.Random(0)
    plain = Superresolution(add_noise=False, jpeg_quality=None)
    out = generators.superresolution(checks, plain, rng)
    assert out.size == checks.size and out.mode == "RGB"
    assert sharpness(out) < 0.2 * sharpness(checks)
    mild = Superresolution(blur_radius=0, downscale_factor=1, add_noise=False, jpeg_quality=None)
    assert np.array_equal(generators.superresolution(checks, mild, rng), checks)
    flat = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = Superresolution(noise_level=0.05, jpeg_quality=None)
    level = np.asarray(generators.superresolution(flat, noisy, rng), dtype=float).std() / 255
    # of 120,000 numbers; rounding to 8 bits adds less
    assert level == pytest.approx(0.05, rel=0.02)


def test_jpeg_loses_more_with_a_lower_quality():
    img = photo(160, 96)

    def error(**params):
        out = generators.jpeg_artifacts(img, JpegArtifacts(**params), random.Random(0))
        return np.abs(np.asarray(out, dtype=float) - np.asarray(img, dtype=float)).mean()

    low, high = (
        error(quality_mode="fixed", quality_range=(quality, quality)) for quality in (5, 90)
    )
    assert low > 3 * high > 0
    assert low > error(quality_range=(5, 90)) > high
    assert error(quality_range=(20, 20), compression_rounds=3) > 0


def test_edges_are_where_the_image_changes():
    img = Image.new("RGB", (100, 60), "black")
    img.paste("white", (40, 0, 100, 60))
    out = np.asarray(generators.edges(img, Edges(), random.Random(0)))
    assert {*np.unique(out).tolist()} == {0, 255}
    columns = np.flatnonzero(out[5:-5, :, 0].any(axis=0))
    assert columns.min() >= 38 and columns.max() <= 41
    faint = Image.new("RGB", (100, 60), (100, 100, 100))
    faint.paste((110, 110, 110), (40, 0, 100, 60))
    assert not np.asarray(generators.edges(faint, Edges(), random.Random(0))).any()
    low = Edges(low_threshold=5, high_threshold=20)
    assert np.asarray(generators.edges(faint, low, random.Random(0))).any()


@pytest.mark.parametrize("kind", ["rectangle", "circle", "brush"])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.3), (0.6, 0.95), (0.05, 0.05)])
def test_a_random_mask_covers_what_it_is_told(kind, low, high):
    params = RandomMask(mask_types=(kind,), min_coverage=low, max_coverage=high)
    covered, seen = [], set()
    for seed in range(30):
        img = photo(150, 100, seed)
        mask = np.asarray(generators.random_mask(img, params, random.Random(seed)))
        assert {*np.unique(mask).tolist()} <= {0, 255}
        covered.append((mask[..., 0] > 0).mean())
        seen.add(mask.tobytes())
        greyed = np.asarray(generators.inpainting(img, params, random.Random(seed)))
        same = (greyed == np.asarray(img)).all(axis=-1)
        assert np.array_equal(same | (greyed == 127).all(axis=-1), np.ones_like(same))
        assert same[mask[..., 0] == 0].all()
    # a side is a whole number of pixels, of 100
    assert low - 0.02 <= min(covered) and max(covered) <= high + 0.02
    assert len(seen) > 20


ENTRY = {
    "id": "set0", "type": "local", "caption_strategy": "filename", "resolution": 128,
    "resolution_type": "pixel_area",
}  # fmt: skip
TEXT = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True}


def load(tmp_path, conditioning):
    entry = ENTRY | {
        "instance_data_dir": str(tmp_path / "images"),
        "cache_dir_vae": str(tmp_path / "cache" / "vae0"),
        "conditioning": conditioning,
    }
    text = TEXT | {"cache_dir": str(tmp_path / "cache" / "text")}
    (tmp_path / "data.json").write_text(json.dumps([entry, text]))
    defaults = DatasetDefaults(cache_dir=tmp_path / "cache")
    return load_data_config(tmp_path / "data.json", defaults=defaults)


def batch(prepared):
    return load_batch(
        prepared, [SampleRef("set0", 0)], rng=caption_rng(0, 0), combine_references=True
    )


@pytest.mark.usefixtures("folder", "no_collection")
def test_a_generated_set_is_made_once_and_anew_where_something_changes(tmp_path, settings):
    conditioning = [
        {"type": "superresolution", "params": {"blur_radius": 1}, "captions": ["sharpen it"]},
        {"type": "random_masks", "params": {"mask_types": ["rectangle"]}},
    ]
    data = load(tmp_path, conditioning)
    assert [each.id for each in data.conditions("set0")] == [
        "set0_conditioning_superresolution",
        "set0_conditioning_random_masks",
    ]
    first = prepare(data, settings)
    one = batch(first)
    assert len(one.references) == 1 and 0 < one.loss_mask.mean() < 1
    assert load_batch(first, [SampleRef("set0", 0)], rng=caption_rng(0, 0)).captions == [
        "sharpen it"
    ]
    made = sorted((tmp_path / "cache" / "generated").rglob("images/**/*.png"))
    assert len(made) == 12
    times = {path: path.stat().st_mtime_ns for path in made}
    again = batch(prepare(load(tmp_path, conditioning), settings))
    assert {path: path.stat().st_mtime_ns for path in made} == times
    assert torch.equal(again.loss_mask, one.loss_mask)
    # made anew it is the same, to the bit
    contents = {path: path.read_bytes() for path in made}
    made[0].unlink()
    made[1].write_bytes(b"damaged")
    prepare(load(tmp_path, conditioning), settings)
    assert {path: path.read_bytes() for path in made} == contents
    # another setting, or another image, makes another one
    conditioning[0]["params"]["blur_radius"] = 3
    photo(200, 100, 55).save(tmp_path / "images" / "wide_0.png")
    prepare(load(tmp_path, conditioning), settings)
    changed = {path for path in made if path.read_bytes() != contents[path]}
    assert {path.name for path in changed} == {"wide_0.png"}
    assert all("random_masks" in str(path) for path in changed)
    # what another run has made with the first setting stays
    after = set((tmp_path / "cache" / "generated").rglob("images/**/*.png")) - set(made)
    assert len(after) == 6 and all("superresolution" in str(path) for path in after)


@pytest.mark.usefixtures("folder", "no_collection")
def test_a_damaged_image_is_left_out_with_its_pair(tmp_path, settings):
    (tmp_path / "images" / "wide_3.png").write_bytes(b"no image")
    report = rendered(prepare(load(tmp_path, {"type": "edges"}), settings).report)
    assert "wide_3.png: unreadable" in report
    assert len(list((tmp_path / "cache" / "generated").rglob("images/**/*.png"))) == 5


@pytest.mark.parametrize(
    ("conditioning", "parts"),
    [
        ({"type": "depth_midas"}, ['"conditioning.0.type"', "not implemented yet"]),
        ({"type": "super"}, ["must be one of", '"superresolution"']),
        ({"type": "canny", "params": {"lw": 1}}, ['"lw" is not one of its settings']),
        ({"type": "canny", "params": {"low": 9, "high": 3}}, ["low_threshold (9) is above"]),
        ({"type": "jpeg_artifacts", "params": {"quality_range": [50, 5]}}, ["quality_range"]),
        ({"type": "random_masks", "params": {"min_coverage": 0.9}}, ["min_coverage (0.9)"]),
        ({"type": "edges", "captions": True}, ["must be false, a text or a list"]),
        ({"type": "edges", "conditioning_type": "controlnet"}, ["conditioning_type"]),
        ([{"type": "edges"}, {"type": "edges"}], ["set0_conditioning_edges", "give each its own"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, conditioning, parts):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, conditioning)
    assert len(raised.value.problems) == 1
    assert all(part in str(raised.value) for part in parts), str(raised.value)
