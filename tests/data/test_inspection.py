"""What `fluxfast-train data` finds out about odd folders, and that a run would find the same."""

import os

import pytest
from data_fixtures import photo
from pair_cases import conditions, copy_shapes, linked
from PIL import Image
from prepare_cases import config
from rich.progress import Progress

import fluxfast.data.inspection as inspection
from fluxfast.data.caption_lengths import token_counter
from fluxfast.data.inspection import inspect
from fluxfast.data.prepare import prepare
from fluxfast.data.sampler import Sampler
from fluxfast.data.survey import survey


def look(data, progress=None, **options):
    """(what was found of each dataset, why a run could not start)."""
    bars = progress or Progress(disable=True)
    counter = token_counter(("absent", None, None), max_length=512)
    return inspect(survey(data, bars, **options), counter, bars)


@pytest.fixture
def odd_folder(folder):
    """`folder` with what people's folders hold beside good images."""
    good = (folder / "wide_0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.webp").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "really a png.jpg").write_bytes((folder / "wide_1.png").read_bytes())
    (folder / "raw.cr2").write_bytes(b"x")
    (folder / "sub" / "deeper").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    photo(200, 100, 40).save(folder / "sub" / "deeper" / "turned.jpg", exif=exif)
    (folder / os.fsdecode(b"M\xfcnchen.png")).write_bytes((folder / "wide_2.png").read_bytes())
    photo(200, 100, 3).resize((100, 50)).save(folder / "sub" / "smaller.png")
    (folder / ".hidden.png").write_bytes(good)
    return folder


def test_an_odd_folder(tmp_path, odd_folder):
    (found,), problem = look(
        config(tmp_path, caption_strategy="instanceprompt", instance_prompt="x")
    )
    assert problem == ""
    row = found.dataset.report()
    # the cut file has a whole header, so that only decoding finds it
    assert {each.file: each.detail.split(" ")[0] for each in row.skipped} == {
        "text.jpg": "not",
        "empty.webp": "empty",
        "cut.png": "truncated",
    }
    assert row.unread == ("raw.cr2",)
    assert found.equal == [
        [os.fsdecode(b"M\xfcnchen.png"), "wide_2.png"],
        ["really a png.jpg", "wide_1.png"],
    ]
    assert found.near == [["sub/smaller.png", "wide_3.png"]]
    # the turned image stands upright
    assert [(each.size, each.images) for each in found.buckets] == [
        ("64x192", 3),
        ("192x64", 7),
    ]


def test_a_run_finds_the_same(tmp_path, odd_folder, settings, no_collection):
    """Buckets, batches and left out images are those of `prepare` and the sampler."""
    data = config(tmp_path, repeats=1, train_batch_size=4)
    (found,), _ = look(data)
    prepared = prepare(data, settings)
    seen, run = found.dataset.report(), prepared.report.datasets[0]
    assert seen.buckets == run.buckets
    assert sorted(map(str, seen.skipped)) == sorted(map(str, run.skipped))
    sampler = Sampler(prepared.datasets, seed=0)
    assert sum(each.batches for each in found.buckets) == sampler.batches_per_epoch
    drawn = 4 * sampler.batches_per_epoch
    assert sum(each.filled for each in found.buckets) == drawn - seen.samples_per_epoch


def test_a_second_look_decodes_only_what_has_changed(tmp_path, folder, monkeypatch):
    decoded = []
    load = inspection.load_image

    def watched(path, **options):
        decoded.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(inspection, "load_image", watched)
    monkeypatch.setattr(inspection, "_FILES_PER_WRITE", 4)
    (first,), _ = look(config(tmp_path))
    assert len(decoded) == 6
    decoded.clear()
    photo(200, 100, 1).resize((100, 50)).save(folder / "wide_0.png")
    (second,), _ = look(config(tmp_path))
    assert decoded == ["wide_0.png"]
    assert (first.near, second.near) == ([], [["wide_0.png", "wide_1.png"]])


def test_bars_count_to_their_end(tmp_path, folder):
    progress = Progress(disable=True)
    look(config(tmp_path), progress)
    assert {task.description: (task.completed, task.total) for task in progress.tasks} == {
        "scanning set0": (6, 6),
        "looking at set0": (6, 6),
    }


def test_caption_files_without_an_image(tmp_path, folder):
    for name in ("wide_0", "wide_1", "raw", "alone", "sub/alone too", ".hidden"):
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "raw.cr2").write_bytes(b"x")
    # a cache in the folder is no data
    (tmp_path / "images" / "cache").mkdir()
    (tmp_path / "images" / "cache" / "note.txt").touch()
    data = config(tmp_path, caption_strategy="textfile", cache_dir_vae=folder / "cache")
    (found,), _ = look(data)
    assert found.caption_files.alone == ["alone.txt", "sub/alone too.txt"]
    assert found.caption_files.ignored == 0
    (found,), _ = look(config(tmp_path, caption_strategy="filename"))
    assert (found.caption_files.alone, found.caption_files.ignored) == ([], 3)


def test_captions_of_every_image_are_counted(tmp_path, folder):
    (folder / "wide_0.txt").write_text("one\n" + "two " * 600)
    (folder / "wide_1.txt").write_text("three")
    (found,), _ = look(config(tmp_path, caption_strategy="textfile"))
    assert found.captions.total == 3
    assert [each.file for each in found.captions.t5] == ["wide_0.png"]


def test_why_a_run_could_not_start(tmp_path, folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-300])
    (found,), problem = look(config(tmp_path))
    assert "none of them usable" in problem and "6x unreadable" in problem
    assert (found.buckets, found.near) == ([], [])


def test_raised_repeats_are_shown(tmp_path, folder):
    (found,), problem = look(
        config(tmp_path), train_batch_size=4, allow_dataset_oversubscription=True
    )
    assert problem == "" and found.dataset.repeats == 1
    assert [(each.images, each.batches, each.filled) for each in found.buckets] == [
        (2, 1, 0),
        (4, 2, 0),
    ]


def test_every_missing_folder_is_named(tmp_path):
    data = config(
        tmp_path, {"instance_data_dir": tmp_path / "one"}, {"instance_data_dir": tmp_path / "two"}
    )
    with pytest.raises(ValueError, match=r"one: no such folder.*\n.*two: no such folder"):
        look(data)


def test_images_of_damaged_partners_are_left_out_as_a_run_does(
    tmp_path, folder, settings, no_collection
):
    copy_shapes(tmp_path, "mask", lambda size, stem: photo(*size))
    copy_shapes(tmp_path, "reference_loose", lambda size, stem: photo(*size, seed=2))
    for whole in (tmp_path / "mask/wide_0.png", tmp_path / "reference_loose/sub/tall_1.png"):
        damaged = whole.with_suffix(".jpg")
        Image.open(whole).save(damaged)
        whole.unlink()
        # its header is whole, so that only decoding finds it
        damaged.write_bytes(damaged.read_bytes()[:-300])
    data = linked(tmp_path, *conditions(tmp_path, "mask", "reference_loose"), repeats=1)
    (found,), problem = look(data)
    skipped = prepare(data, settings).report.datasets[0].skipped
    assert sorted(map(str, found.dataset.report().skipped)) == sorted(map(str, skipped))
    assert {(each.file, each.reason) for each in skipped} == {
        ("wide_0.png", "its mask: unreadable"),
        ("sub/tall_1.png", "its reference_loose: unreadable"),
    }
    assert problem == "" and [each.pairs for each in found.pairs] == [4, 4]


def test_captions_of_references_are_measured(tmp_path, folder):
    for kind in ("mask", "reference_loose"):
        copy_shapes(tmp_path, kind, lambda size, stem: photo(*size))
    (tmp_path / "reference_loose/wide_0.txt").write_text("long " * 700)
    for path in (tmp_path / "reference_loose").rglob("*.png"):
        if path.stem != "wide_0":
            path.with_suffix(".txt").write_text("short")
    own = conditions(tmp_path, "reference_loose", caption_strategy="textfile")
    (found,), _ = look(linked(tmp_path, *own, *conditions(tmp_path, "mask")))
    assert found.captions.total == 12
    assert [each.file for each in found.captions.t5] == ["reference_loose/wide_0.png"]
