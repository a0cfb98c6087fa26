"""Images that a CSV file names are fetched once, and each failure is named."""

from pathlib import Path

import pytest
from backend_cases import captions, png, reasons, surveyed, web

import fluxfast.data.csv_images as csv_images
import fluxfast.data.mirror as mirror
from fluxfast.config.backends import CsvFile


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(csv_images, "_PAUSE", 0.0)
    monkeypatch.setattr(csv_images, "_SILENCE", 0.3)


def _dataset(tmp_path, text, **options):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8-sig")
    keys = {"type": "csv", "caption_strategy": "csv"} | options
    return surveyed(tmp_path, origin=CsvFile(csv_file=tmp_path / "table.csv"), **keys)


def test_images_are_fetched_once_with_their_captions(tmp_path):
    with web({"/a.png": png(seed=1), "/b%20c.png?x=1": png(seed=2)}) as server:
        table = (
            f"caption,url\none,{server.url}/a.png\ntwo,{server.url}/a.png\n"
            f'"three, and more",{server.url}/b%20c.png?x=1\n,\n'
        )
        dataset = _dataset(tmp_path, table)
        assert sorted(captions(dataset).values()) == [("one", "two"), ("three, and more",)]
        assert any("1 rows" in note and "no address" in note for note in dataset.scan.notes)
        assert sorted(server.asked) == ["/a.png", "/b%20c.png?x=1"]
        assert captions(_dataset(tmp_path, table)) == captions(dataset)
        assert len(server.asked) == 2
        # a row that is gone is no longer trained on, and a file that is cut short comes again
        (copy,) = (tmp_path / "copies").glob("a-*")
        copy.write_bytes(b"cut")
        assert len(captions(_dataset(tmp_path, f"caption,url\none,{server.url}/a.png\n"))) == 1
        assert server.asked[2:] == ["/a.png"]


def test_failures_are_named_and_tried_again_where_that_helps(tmp_path):
    kinds = ("404", "500", "slow", "broken")
    answers = {f"/{kind}.png": kind for kind in kinds} | {"/ok.png": png()}
    with web(answers) as server:
        rows = "".join(f"x,{server.url}/{kind}.png\n" for kind in (*kinds, "ok"))
        rows += "x,file:///etc/passwd\nx,gone.png\n"
        dataset = _dataset(tmp_path, "caption,url\n" + rows)
        asked = {kind: server.asked.count(f"/{kind}.png") for kind in kinds}
    told = {file.partition("-")[0]: reason for file, reason in reasons(dataset).items()}
    assert "404" in told["404"] and "500" in told["500"]
    assert "broke off" in told["broken"] and "20 of" in told["broken"]
    assert "could not be fetched" in told["slow"]
    assert "only http(s)" in told["file:///etc/passwd"]
    assert "no such file" in told["gone.png"]
    assert asked == {"404": 1, "500": 3, "slow": 3, "broken": 3}
    assert len(captions(dataset)) == 1
    assert not list((tmp_path / "copies").glob("*.tmp"))


def test_a_file_that_is_too_large_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "MOST_BYTES", 1000)
    with web({"/a.png": png(256, 256)}) as server:
        dataset = _dataset(tmp_path, f"caption,url\nx,{server.url}/a.png\n")
    assert "is larger than" in next(iter(reasons(dataset).values()))
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [".fluxfast-files.json"]


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "free_bytes", lambda path: 0)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"less than 2 GiB are free"):
        _dataset(tmp_path, "caption,url\nx,a.png\n")


def test_paths_start_at_the_tables_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png(seed=1))
    table = "caption,url\nfirst,a.png\n"
    (before,) = _dataset(tmp_path, table).scan.candidates
    (tmp_path / "a.png").write_bytes(png(seed=2))
    (after,) = _dataset(tmp_path, table).scan.candidates
    assert before.file == after.file and before.sha256 != after.sha256


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text,url\n", '"caption".*"csv_caption_column".*it has "text", "url"'),
        ("", 'no column "url"'),
        ("caption,url\n", "has no row with an address"),
    ],
)
def test_tables_that_can_not_be_used(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        _dataset(tmp_path, text)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"set0.*gone\.csv: can't be read as a CSV file"):
        surveyed(tmp_path, type="csv", origin=CsvFile(csv_file=Path(tmp_path / "gone.csv")))
