"""What a start says of captions and enlarged images, before anything is trained on them."""

import os

import pytest
from data_fixtures import photo
from prepare_cases import NOTHING, config, rendered
from rich.console import Console
from rich.progress import Progress

from fluxfast.data.prepare import prepare
from fluxfast.data.remarks import caption_files, remarks
from fluxfast.data.survey import survey


def told(tmp_path, **options):
    """The remarks on the one dataset of a config."""
    (work,) = survey(config(tmp_path, **options), Progress(disable=True)).datasets
    return remarks(work.config, work.scan, caption_files(work.config, work.skip))


@pytest.fixture
def texts(folder):
    """`folder`, with a caption file beside each image."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"caption {number}")
    return folder


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["the captions are the file names", '"caption_strategy": "textfile"']),
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "a photo of sks"},
            ['the captions are the "instance_prompt"', '"a photo of sks"', '"textfile"'],
        ),
        (
            {
                "caption_strategy": "textfile",
                "instance_prompt": "sks",
                "only_instance_prompt": True,
            },
            ['the captions are the "instance_prompt"', 'remove "only_instance_prompt"'],
        ),
    ],
)
def test_text_files_that_are_not_read_are_told_with_the_caption(tmp_path, texts, options, parts):
    found = told(tmp_path, **options)
    (warning,) = [line for line in found.warnings if ".txt" in line]
    assert warning.startswith("6 images have a .txt file that is NOT read")
    assert f'such as "{found.samples[0][1]}"' in warning
    assert all(part in warning for part in parts)


def test_nothing_is_told_of_text_files_that_are_read(tmp_path, texts):
    found = told(tmp_path, caption_strategy="textfile")
    assert found.warnings == []
    # of images that lie apart
    first, second = found.samples
    assert first[1] == "caption 0" and second[1] not in ("caption 0", "caption 1")


def test_images_without_a_caption_are_counted(tmp_path, texts):
    (texts / "wide_0.txt").unlink()
    (texts / "wide_1.txt").write_text(" \n")
    (warning,) = told(tmp_path, caption_strategy="textfile").warnings
    assert warning.startswith("2 of 6 images are NOT trained on: ") and "wide_0.png" in warning


def test_captions_that_are_all_the_same(tmp_path, texts):
    for path in texts.rglob("*.txt"):
        path.write_text("the same\n")
    found = told(tmp_path, caption_strategy="textfile")
    assert found.warnings == ['all 6 images have the same caption, "the same"']
    assert [caption for _, caption in found.samples] == ["the same"]
    for path in texts.rglob("*.txt"):
        path.unlink()
    asked = told(tmp_path, caption_strategy="instanceprompt", instance_prompt="sks")
    assert asked.warnings == [] and [caption for _, caption in asked.samples] == ["sks"]


@pytest.mark.parametrize(("resolution", "factor"), [(64, None), (128, "1.28"), (256, "2.56")])
def test_enlarged_images_are_counted(tmp_path, resolution, factor):
    """An image of 100x100 pixels, and one of 512x512 that no resolution here enlarges."""
    (tmp_path / "images").mkdir()
    photo(100, 100, 1).save(tmp_path / "images" / "small.png")
    photo(512, 512, 2).save(tmp_path / "images" / "large.png")
    found = told(tmp_path, resolution=resolution)
    # only much enlarged images are a warning, which names what helps
    lines = found.notes if factor == "1.28" else found.warnings
    assert len(found.warnings) + len(found.notes) == (factor is not None)
    for line in lines:
        assert line.startswith("1 of 2 images is enlarged to reach the training size, by up to ")
        assert f"{factor} times (small.png, 100x100 pixels)" in line
        assert ('"minimum_image_size"' in line) == (factor == "2.56")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_captions_are_cut_to_the_width(tmp_path, texts, width):
    odd = texts / os.fsdecode(b"[bold] M\xfcnchen, a name that is longer than a line.png")
    odd.write_bytes((texts / "wide_0.png").read_bytes())
    odd.with_suffix(".txt").write_text("[red] a caption that goes on and on, " * 9)
    found = told(tmp_path, caption_strategy="textfile")
    assert found.samples[0][0] == odd.name
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        console = Console(width=width, record=True, file=nowhere)
        console.print(found)
        lines = console.export_text().splitlines()
    assert len(lines) == 3 and all(len(line) <= width for line in lines)
    assert "[bold]" in lines[1] and "[red]" in lines[1]


def test_a_start_tells_them_before_it_encodes_anything(tmp_path, texts, settings, encoders):
    told, data = [], config(tmp_path, resolution=256)
    for encoded in (True, False):
        encoders.reset()

        def remark(found):
            assert encoders == NOTHING
            told.append(found)

        text = rendered(prepare(data, settings, remark=remark).report)
        assert ("newly encoded: 6 images, 7 texts" in text) == encoded
    # whether the caches are full makes no difference
    assert told[0] == told[1] and len(told) == 2
    text = rendered(told[0])
    assert "captions of set0, as they are trained:" in text
    assert "! set0: 6 images have a .txt file that is NOT read" in text
    assert "! set0: 6 of 6 images are enlarged" in text
