"""Crops that keep a face: where they lie, when faces are looked for, and images without one."""

import random
import threading
from pathlib import Path

import pytest
from data_fixtures import photo
from prepare_cases import NOTHING, config, rendered

from fluxfast.config.face_detector import face_cascade
from fluxfast.data import faces
from fluxfast.data.buckets import plan_crop
from fluxfast.data.faces import largest_face
from fluxfast.data.images import load_image
from fluxfast.data.prepare import prepare


def box(size, face, **options):
    settings = {"resolution": 128, "crop": True, "crop_style": "face"}
    return plan_crop(size, face=face, rng=random.Random(0), **settings | options).crop_box


@pytest.mark.parametrize(
    ("size", "face", "expected"),
    [
        # 512x128 is what 400x100 is resized to; the face's middle is at 256 + 64 of it
        ((400, 100), (240, 0, 260, 100), (256, 0, 384, 128)),
        # as far as the image reaches
        ((400, 100), (0, 0, 20, 100), (0, 0, 128, 128)),
        ((400, 100), (390, 0, 400, 100), (384, 0, 512, 128)),
        ((100, 400), (0, 240, 100, 260), (0, 256, 128, 384)),
        # none: the middle
        ((400, 100), None, (192, 0, 320, 128)),
    ],
)
def test_a_crop_has_the_face_in_its_middle(size, face, expected):
    assert box(size, face) == expected


def test_other_styles_do_not_look_at_faces():
    assert box((400, 100), (390, 0, 400, 100), crop_style="center") == (192, 0, 320, 128)


@pytest.fixture
def found(monkeypatch):
    """The sizes of the images that were searched; in wide ones there is a face on the left."""
    searched = []

    def detect(img):
        searched.append(img.size)
        return (0, 20, 40, 60) if img.size == (200, 100) else None

    monkeypatch.setattr("fluxfast.data.scan.largest_face", detect)
    return searched


FACE = {"crop": True, "crop_style": "face"}


def test_faces_are_looked_for_once(tmp_path, folder, settings, encoders, found):
    plain = prepare(config(tmp_path, crop=True, crop_style="center"), settings)
    assert found == []
    prepared = prepare(config(tmp_path, **FACE), settings)
    assert sorted(found) == [(100, 200)] * 2 + [(200, 100)] * 4
    assert "set0: 2 images show no face (such as sub/tall_0.png): the middle is kept" in rendered(
        prepared.report
    )
    pairs = zip(plain.datasets[0].samples, prepared.datasets[0].samples, strict=True)
    # latents of other crops are other latents, and those of the same crop are not computed again
    assert [left.fingerprint == right.fingerprint for left, right in pairs] == [True] * 2 + [
        False
    ] * 4
    assert encoders.images == 6 + 4
    encoders.reset()
    found.clear()
    again = prepare(config(tmp_path, **FACE), settings)
    assert (found, encoders) == ([], NOTHING)
    assert again.datasets[0].samples == prepared.datasets[0].samples
    assert "2 images show no face" in rendered(again.report)
    photo(200, 100, 50).save(folder / "wide_0.png")
    prepare(config(tmp_path, **FACE), settings)
    assert found == [(200, 100)]


def test_a_broken_image_is_left_out_as_ever(tmp_path, folder, settings, found):
    data = (folder / "wide_0.png").read_bytes()
    (folder / "wide_0.png").write_bytes(data[: len(data) // 2])
    prepared = prepare(config(tmp_path, **FACE), settings)
    assert "wide_0.png: unreadable (truncated)" in rendered(prepared.report)


def test_without_a_detector_nothing_is_searched(monkeypatch):
    monkeypatch.setattr(faces, "face_cascade", lambda: None)
    monkeypatch.setattr(faces, "_of_thread", threading.local())
    with pytest.raises(ValueError, match=r'needs a face detector: pip install "fluxfast\[faces\]"'):
        largest_face(photo(64, 64))


@pytest.mark.skipif(face_cascade() is None, reason="fluxfast[faces] is not installed")
def test_a_photograph_of_a_face():
    skimage = pytest.importorskip("skimage")
    astronaut = load_image(Path(skimage.__file__).parent / "data" / "astronaut.png")
    # her eyes and mouth are in it, and little else; at any size
    for width in (512, 2048):
        scale = width / 512
        left, top, right, bottom = (
            edge / scale for edge in largest_face(astronaut.resize((width, width)))
        )
        assert left < 205 and right > 240
        assert top < 105 and bottom > 140
        assert right - left < 130 and bottom - top < 130
    assert largest_face(photo(300, 300)) is None
