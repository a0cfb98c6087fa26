"""Files that change while a start looks at them: named, left out or read again, never mixed up."""

import pytest
import torch
from data_fixtures import photo
from prepare_cases import config, rendered

from fluxfast.data import encode, images, scan
from fluxfast.data.batches import caption_rng, load_batch
from fluxfast.data.prepare import prepare
from fluxfast.data.sampler import SampleRef


def latents(prepared):
    (dataset,) = prepared.datasets
    refs = [SampleRef(dataset.id, i) for i in range(len(dataset.samples))]
    return {
        sample.file: load_batch(prepared, [ref], rng=caption_rng(0, 0)).latents
        for sample, ref in zip(dataset.samples, refs, strict=True)
    }


@pytest.mark.usefixtures("folder", "no_collection")
def test_an_image_that_changes_after_the_scan_is_left_out_and_told(tmp_path, settings, monkeypatch):
    """Of the same size, so that nothing but its content tells; the next start has the new one."""
    path = tmp_path / "images" / "wide_1.png"
    encode_images = encode.ImageEncoding.encode

    def overwritten(self, *args, **options):
        photo(200, 100, 99).save(path)
        return encode_images(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(encode.ImageEncoding, "encode", overwritten)
        first = prepare(config(tmp_path), settings)
    assert "wide_1.png: unreadable (changed since the start)" in rendered(first.report)
    assert "wide_1.png" not in latents(first)
    second = latents(prepare(config(tmp_path), settings))
    fresh = prepare(config(tmp_path, cache_dir_vae=tmp_path / "other"), settings)
    assert torch.equal(second["wide_1.png"], latents(fresh)["wide_1.png"])


@pytest.mark.usefixtures("folder", "no_collection")
def test_an_image_that_is_written_while_it_is_scanned_is_scanned_again(
    tmp_path, settings, monkeypatch
):
    path, size_of = tmp_path / "images" / "wide_1.png", scan.image_size

    def overwritten(file):
        size = size_of(file)
        if file == path:
            photo(100, 200, 99).save(path)
        return size

    with monkeypatch.context() as patch:
        patch.setattr(scan, "image_size", overwritten)
        prepare(config(tmp_path), settings)
    (dataset,) = prepare(config(tmp_path), settings).datasets
    targets = {sample.file: sample.target for sample in dataset.samples}
    assert targets["wide_1.png"] == targets["sub/tall_0.png"] != targets["wide_0.png"]


@pytest.mark.usefixtures("folder")
def test_files_and_folders_that_vanish_are_no_error(tmp_path, settings, monkeypatch):
    gone = tmp_path / "images" / "gone"
    gone.mkdir()
    photo(100, 100).save(gone / "a.png")
    readable = images.looks_like_an_image

    def vanishing(path):
        # the listing of the folders' parent is behind, their own is to come
        if gone.exists() and path.parent == tmp_path / "images":
            (gone / "a.png").unlink()
            gone.rmdir()
            (tmp_path / "images" / "wide_2.png").unlink()
        return readable(path)

    monkeypatch.setattr(images, "looks_like_an_image", vanishing)
    prepared = prepare(config(tmp_path), settings)
    assert {sample.file for sample in prepared.datasets[0].samples} == {
        "wide_0.png", "wide_1.png", "wide_3.png", "sub/tall_0.png", "sub/tall_1.png",
    }  # fmt: skip
