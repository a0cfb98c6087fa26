"""Equal files and images that look the same: found under other sizes and formats, and no others."""

import io

import numpy as np
import pytest
from data_fixtures import photo
from PIL import Image, ImageEnhance

from fluxfast.data.duplicates import EDGE, equal_files, image_hashes, image_print, near_images
from photographs import photographs


def groups(*images):
    """The groups of the images' positions."""
    return near_images(range(len(images)), [image_print(img) for img in images])


def as_jpeg(img, quality):
    data = io.BytesIO()
    img.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def edited(img):
    """The image as people come to have it twice."""
    third, double = ((img.width * n // 3, img.height * n // 3) for n in (1, 6))
    return [
        as_jpeg(img, 30),
        img.resize(third),
        img.resize(double),
        ImageEnhance.Brightness(img).enhance(1.1),
    ]


@pytest.mark.parametrize("path", photographs(), ids=lambda path: path.stem)
def test_a_photograph_is_known_again(path):
    with Image.open(path) as img:
        original = img.convert("RGB")
    others = [photo(300, 200, seed) for seed in range(3)]
    assert groups(original, *others, *edited(original)) == [[0, 4, 5, 6, 7]]


def test_different_photographs_are_not_taken_for_each_other():
    images = []
    for path in photographs():
        with Image.open(path) as img:
            # mirrored, and a corner of it: the same colours, another picture
            mirrored = img.convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            images += [img.convert("RGB"), mirrored]
    assert groups(*images) == []


def test_what_has_no_structure_is_told_apart_by_its_colour():
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    assert groups(red, blue, red.resize((200, 100))) == [[0, 2]]


def test_small_objects_on_white_are_not_the_same():
    images = []
    for x in (20, 80, 140):
        for colour in ("red", "green"):
            img = Image.new("RGB", (180, 180), "white")
            img.paste(colour, (x, x, x + 25, x + 25))
            images.append(img)
    assert groups(*images) == []
    assert groups(*images, as_jpeg(images[3], 60)) == [[3, 6]]


def test_images_that_look_alike_in_a_chain_are_one_group_in_the_given_order():
    grey = np.random.default_rng(0).choice([40, 140, 240], (EDGE, EDGE))
    chain = []
    for brightness in (1.0, 0.8, 0.6, 0.4):
        pixels = np.rint(grey * brightness).astype(np.uint8)
        chain.append(Image.fromarray(pixels).convert("RGB"))
    # the first and the last differ by more than MAX_COLOUR
    assert groups(chain[0], chain[3]) == []
    assert groups(chain[2], chain[0], chain[3], chain[1]) == [[0, 1, 2, 3]]


def test_pairs_are_those_that_comparing_all_would_give():
    """The words find every pair within MAX_BITS, wherever the bits lie."""
    rng = np.random.default_rng(0)
    prints = []
    for _ in range(60):
        base = rng.integers(0, 256, (EDGE, EDGE, 3)).astype(np.int16)
        prints += [base, base + rng.integers(-12, 13, base.shape)]
    data = [np.clip(each, 0, 255).astype(np.uint8).tobytes() for each in prints]
    hashes = image_hashes(data)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)
    near = [[i, i + 1] for i in range(0, len(data), 2) if bits[i, i + 1] <= 8]
    assert 5 < len(near) < 60
    assert near_images(range(len(data)), data) == near


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_compare(count):
    assert groups(*[photo(50, 50)] * count) == []


def test_ten_thousand_blank_pages_are_one_group():
    blank = image_print(Image.new("RGB", (10, 10), "white"))
    names = [str(i) for i in range(10_000)]
    assert near_images(names, [blank] * len(names)) == [names]


def test_tiny_and_thin_images_have_prints():
    for size in [(1, 1), (1, 3000), (3000, 1), (7, 9)]:
        assert len(image_print(photo(*size))) == EDGE * EDGE * 3


def test_equal_files():
    assert equal_files(["a", "b", "c", "d", "e"], ["1", "2", "1", "3", "2"]) == [
        ["a", "c"],
        ["b", "e"],
    ]
