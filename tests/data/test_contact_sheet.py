"""The contact sheet: crops are bright, texts stay in their places, buckets have their shares."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import photo
from pair_cases import conditions
from PIL import Image

import fluxfast.data.contact_sheet as contact_sheet
import fluxfast.data.lettering as lettering
from fluxfast.data.buckets import CropPlan
from fluxfast.data.contact_sheet import CELL, GAP, MARGIN, choose, crop_shown, write_sheet
from fluxfast.data.lettering import BOX, Lettering
from fluxfast.data.pairs import Pairing, pair
from fluxfast.data.scan import Candidate, Scan

GREEN = (10, 200, 30)


def candidate(path, target=(64, 64), intermediary=None, box=None, caption="a caption"):
    plan = CropPlan(
        target,
        intermediary or target,
        box or (0, 0, *target),
        str(round(target[0] / target[1], 2)),
    )
    with Image.open(path) as img:
        return Candidate(path.name, path, img.size, "", plan, (caption,))


def test_the_crop_is_bright_and_the_rest_dark():
    plan = CropPlan((64, 64), (128, 64), (32, 0, 96, 64), "1.0")
    shown = np.asarray(crop_shown(Image.new("RGB", (400, 200), "white"), plan, (200, 100)))
    dark = round(255 * contact_sheet.OUTSIDE)
    # the box of 32 to 96 of 128 pixels is 50 to 150 of 200
    assert (shown[:, :50] == dark).all() and (shown[:, 150:] == dark).all()
    assert (shown[1:-1, 51:149] == 255).all()
    frame = (255, 122, 0)
    assert (shown[:, 50] == frame).all() and (shown[:, 149] == frame).all()
    assert (shown[0, 50:150] == frame).all() and (shown[-1, 50:150] == frame).all()


def test_a_crop_out_of_a_much_larger_image_is_still_seen():
    plan = CropPlan((64, 64), (64_000, 64), (63_936, 0, 64_000, 64), "1.0")
    shown = np.asarray(crop_shown(Image.new("RGB", (2000, 2), "white"), plan, (200, 1)))
    assert (shown[0, 199] == (255, 122, 0)).all() and (shown[0, :199] < 80).all()


def test_the_sheet_shows_the_pixels_of_an_image(tmp_path):
    Image.new("RGB", (200, 100), (10, 200, 30)).save(tmp_path / "a.png")
    sheet = tmp_path / "out" / "sheet.png"
    chosen = [candidate(tmp_path / "a.png", (128, 64))]
    assert write_sheet(sheet, "set", chosen, images=9) == 1
    with Image.open(sheet) as img:
        pixels = np.asarray(img)
    shown = np.argwhere((pixels == (10, 200, 30)).all(axis=2))
    (top, left), (bottom, right) = shown.min(axis=0), shown.max(axis=0)
    # the image is 200x100, and its frame takes a pixel on each side
    assert (left, right) == (MARGIN + 1, MARGIN + CELL - 2) and bottom - top == 97
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]


def test_an_upright_image_is_shown_as_it_is_cropped(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    img = Image.new("RGB", (200, 100), "blue")
    img.paste("red", (0, 0, 100, 100))
    img.save(tmp_path / "a.png", exif=exif)
    sheet = tmp_path / "sheet.png"
    one = candidate(tmp_path / "a.png", (64, 128))
    upright = Candidate(one.file, one.path, (100, 200), "", one.crop_plan, one.captions)
    write_sheet(sheet, "set", [upright], images=9)
    with Image.open(sheet) as drawn:
        pixels = np.asarray(drawn)
    red, blue = (
        np.argwhere((pixels == colour).all(axis=2)) for colour in ((255, 0, 0), (0, 0, 255))
    )
    # turned by a right angle, the left half is the upper one
    assert red[:, 0].max() < blue[:, 0].min()
    assert (red[:, 1].min(), red[:, 1].max()) == (blue[:, 1].min(), blue[:, 1].max())


@pytest.mark.parametrize(
    "caption",
    [
        "W" * 500,
        "many words " * 100,
        "город ночью " * 40,
        "一只可爱的猫坐在窗台上" * 20,
        "\u0645\u0646\u0638\u0631 " * 40,
        "one\nline\tafter another",
        "😀👩‍👩‍👧",
        " ",
    ],
)
def test_no_text_leaves_its_place(tmp_path, caption):
    photo(30, 20).save(tmp_path / ("a" * 120 + ".png"))
    path = next(tmp_path.iterdir())
    sheet = tmp_path / "out.png"
    write_sheet(sheet, "title " * 100, [candidate(path, caption=caption)], images=1)
    with Image.open(sheet) as img:
        pixels = np.asarray(img).astype(int)
    ink = (pixels < 255).any(axis=2)
    # nothing touches the margins (a letter may reach a pixel before its place)
    assert not ink[:, : MARGIN - 1].any() and not ink[:, -MARGIN + 2 :].any()
    assert not ink[-MARGIN // 2 :].any() and not ink[: MARGIN // 2].any()
    # under the picture, texts keep to their cell; the last line, on missing letters, is the sheet's
    picture = np.flatnonzero((pixels == (255, 122, 0)).all(axis=2).any(axis=1))
    below = ink[picture.max() + 1 : -MARGIN - Lettering(12).line_height]
    assert below[:, MARGIN : MARGIN + CELL].any()
    assert not below[:, MARGIN + CELL + 1 :].any()


def test_lines_are_cut_with_an_ellipsis_and_keep_their_words():
    text = Lettering(12)
    found = text.lines("alpha beta gamma delta epsilon zeta " * 9, 100, 3)
    assert len(found) == 3 and found[-1].endswith("…")
    assert all(text.width(line) <= 100 for line in found)
    assert set(" ".join(found[:2]).split()) <= {
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
    }
    assert text.lines("short", 100, 3) == ["short"]
    assert text.lines("", 100, 3) == []


def test_a_long_name_keeps_its_ends():
    text = Lettering(12)
    short = text.shortened("folder/" + "x" * 200 + "-end.png", 150)
    assert short.startswith("folder") and short.endswith(".png") and "…" in short
    assert text.width(short) <= 150
    assert text.shortened("a.png", 150) == "a.png"


def test_letters_come_from_a_font_that_has_them(monkeypatch):
    """What DejaVu Sans lacks is taken from another font; only what none has becomes a box."""
    folder = Path(Lettering(12)._own).parent
    stix = str(folder / "STIXGeneral.ttf")
    alone = {ord(c) for c in map(chr, lettering._characters(stix))} - lettering._characters(
        Lettering(12)._own
    )
    letter = chr(next(c for c in sorted(alone) if chr(c).isalpha()))
    try:
        for fonts, path, shown, lacking in (
            ([str(folder / "absent.ttf"), stix], stix, letter, set()),
            ([], Lettering(12)._own, BOX, {letter}),
        ):
            lettering.font_with.cache_clear()
            monkeypatch.setattr(lettering, "_system_fonts", lambda fonts=fonts: fonts)
            text = Lettering(12)
            assert text._runs(letter) == [(path, shown)]
            assert text.lacking == lacking
    finally:
        lettering.font_with.cache_clear()


def test_each_bucket_has_its_share_from_all_over_the_folder(tmp_path):
    photo(20, 20).save(tmp_path / "x.png")
    one = candidate(tmp_path / "x.png")

    def many(target, count):
        plan = CropPlan(target, target, (0, 0, *target), "1.0")
        return [Candidate(f"{i:03}", one.path, one.size, "", plan, ("c",)) for i in range(count)]

    chosen = choose([*many((64, 64), 100), *many((128, 64), 2), *many((64, 128), 1)], 13)
    files = {size: [each.file for each in group] for size, group in chosen.items()}
    assert files[64, 128] == ["000"] and files[128, 64] == ["000", "001"]
    assert files[64, 64] == [f"{i:03}" for i in range(0, 100, 10)]
    assert list(files) == sorted(files)
    assert sum(map(len, choose(many((64, 64), 5), 9).values())) == 5
    assert len(choose([*many((64, 64), 5), *many((64, 128), 5)], 1)) == 1


def test_a_file_that_vanished_leaves_a_grey_place(tmp_path):
    photo(40, 40).save(tmp_path / "a.png")
    chosen = [candidate(tmp_path / "a.png")]
    (tmp_path / "a.png").unlink()
    assert write_sheet(tmp_path / "sheet.png", "set", chosen, images=1) == 1
    with Image.open(tmp_path / "sheet.png") as img:
        assert (np.asarray(img) == (0x6B, 0x6B, 0x6B)).all(axis=2).sum() >= CELL * CELL


def paired(tmp_path, kind, partner):
    """The pixels of the sheet of one green image, whose crop is the middle, beside a partner."""
    folder = tmp_path / kind
    folder.mkdir()
    Image.new("RGB", (200, 100), GREEN).save(tmp_path / "a.png")
    one = candidate(tmp_path / "a.png", (64, 64), (128, 64), (32, 0, 96, 64))
    own = []
    if partner is not None:
        partner.save(folder / "a.png")
        own = [candidate(folder / "a.png", (128, 64))]
    (config,) = conditions(tmp_path, kind)
    found = pair("set", Scan(1, [one], []), config, None, Scan(len(own), own, []))
    write_sheet(tmp_path / "sheet.png", "set", [one], images=1, pairings=[found])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    second = MARGIN + CELL + GAP
    return pixels[:, second : second + CELL]


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_a_mask_lies_over_its_image_where_the_crop_is(tmp_path, kind):
    half = Image.new("RGB", (400, 200), "black")
    half.paste("white", (0, 0, 200, 200))
    shown = paired(tmp_path, kind, half)
    tinted = np.round(0.25 * np.array(GREEN) + 0.75 * np.array((0x20, 0, 0xC0)))
    kept, left_out = (
        np.argwhere((abs(shown.astype(int) - colour) <= 2).all(axis=2))[:, 1]
        for colour in (GREEN, tinted)
    )
    # the crop is the columns 50 to 150, in a frame of a pixel, and the mask's edge its middle; the
    # weights of the latents at the edge are between
    assert kept.min() == 51 and left_out.max() == 148
    assert 85 <= kept.max() < left_out.min() <= 115


def test_a_reference_is_cut_as_it_will_be(tmp_path):
    strict = paired(tmp_path, "reference_strict", Image.new("RGB", (100, 50), "white"))
    framed = np.flatnonzero((strict == (255, 122, 0)).all(axis=2).any(axis=0))
    assert (framed.min(), framed.max()) == (50, 149)
    loose = paired(tmp_path, "reference_loose", Image.new("RGB", (100, 50), "white"))
    framed = np.flatnonzero((loose == (255, 122, 0)).all(axis=2).any(axis=0))
    assert (framed.min(), framed.max()) == (0, 199)


@pytest.mark.parametrize("partner", [None, Image.new("RGB", (50, 100), "white")])
def test_a_partner_that_is_missing_or_unfit_is_marked(tmp_path, partner):
    red = (0xC0, 0, 0)
    assert (paired(tmp_path, "mask", partner) == red).all(axis=2).any()
    fitting = paired(tmp_path, "segmentation", Image.new("RGB", (200, 100), "white"))
    assert not (fitting == red).all(axis=2).any()


def test_an_image_and_its_partners_stay_in_one_row(tmp_path):
    """Four places a group: a sheet of six columns has room for one group a row."""
    photo(40, 40).save(tmp_path / "a.png")
    images = [replace(candidate(tmp_path / "a.png"), file=f"{i}.png") for i in range(3)]
    lost = dict.fromkeys((each.file for each in images), "")
    (config,) = conditions(tmp_path, "mask")
    pairings = [Pairing("set", config, None, {}, lost, {})] * 3
    write_sheet(tmp_path / "sheet.png", "set", images, images=3, pairings=pairings)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 2 * MARGIN + 4 * CELL + 3 * GAP
        pixels = np.asarray(sheet)
    framed = (pixels == (255, 122, 0)).all(axis=2)
    assert framed[:, : MARGIN + CELL].any() and not framed[:, MARGIN + CELL :].any()
    # each picture's frame has CELL rows
    assert framed.any(axis=1).sum() == 3 * CELL
