"""Which suffixes are read depends on Pillow's build and on packages; here both are faked."""

import sys
import types
from pathlib import Path

import pytest
from PIL import Image, features

from fluxfast.data import image_kinds
from fluxfast.data.images import UnreadableImage, load_image


@pytest.fixture(autouse=True)
def _asked_anew():
    image_kinds.readable.cache_clear()
    yield
    image_kinds.readable.cache_clear()


@pytest.fixture
def without(monkeypatch):
    """Hide a package that may be installed."""

    def hide(format, module):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(Image.OPEN, format, raising=False)

    return hide


def test_a_package_that_is_installed_is_used(monkeypatch):
    module = types.ModuleType("pillow_heif")
    # any decoder will do
    module.register_heif_opener = lambda: Image.OPEN.setdefault("HEIF", Image.OPEN["PNG"])
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert all(
        image_kinds.is_readable(Path(name)) for name in ("a.heic", "IMG_1.HEIC", "b.heif", "c.hif")
    )
    assert "HEIF" in image_kinds.decoders(Path("a.jpg"))


def test_without_the_package_it_is_named(without, tmp_path):
    without("HEIF", "pillow_heif")
    without("JXL", "pillow_jxl")
    assert not image_kinds.is_readable(Path("a.heic"))
    assert image_kinds.how_to_read(".heic") == "pip install pillow-heif"
    assert image_kinds.how_to_read(".jxl") == "pip install pillow-jxl-plugin"
    assert image_kinds.how_to_read(".dng") is None
    # what phones' photographs are often renamed to
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(
        UnreadableImage, match=r"holds HEIC under another name.*pip install pillow-heif"
    ):
        load_image(tmp_path / "a.jpg")


def test_a_pillow_without_avif(monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    assert not image_kinds.is_readable(Path("a.avif"))
    assert "AVIF" not in image_kinds.decoders(Path("a.avif"))
    assert image_kinds.is_readable(Path("a.webp"))
    assert "AVIF" in image_kinds.how_to_read(".avif")


@pytest.mark.parametrize(
    "name",
    [
        "a.HEIC",
        "a.jxl",
        "a.dng",
        "a.CR2",
        "a.cr3",
        "a.nef",
        "a.arw",
        "a.psd",
        "a.svg",
        "a.exr",
        "a.hdr",
        "a.ico",
    ],
)
def test_names_of_images(name):
    assert image_kinds.looks_like_an_image(Path(name))


@pytest.mark.parametrize(
    "name", ["a.txt", "a.json", "a.mp4", "a.npz", "a.safetensors", "a.pdf", "a", "png", "a.db"]
)
def test_names_of_other_files(name):
    assert not image_kinds.looks_like_an_image(Path(name))


def test_tga_is_tried_by_its_name_alone():
    assert "TGA" in image_kinds.decoders(Path("a.TGA"))
    assert "TGA" not in image_kinds.decoders(Path("a.png"))
    assert not {"EPS", "PDF"} & set(image_kinds.decoders(Path("a.eps")))
