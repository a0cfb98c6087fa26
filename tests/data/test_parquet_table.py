"""A Parquet table says which images there are, and their captions."""

import pyarrow
import pyarrow.parquet
import pytest
from backend_cases import captions, png, reasons, surveyed

from fluxfast.config.backends import ParquetTable


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png", "odd.v1.png")):
        (tmp_path / "images" / name).write_bytes(png(64, 64, i))
    return tmp_path


def _dataset(tmp_path, table, *, metadata="parquet", **options):
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    return surveyed(
        tmp_path,
        metadata_backend=metadata,
        caption_strategy="parquet",
        parquet=ParquetTable(path=tmp_path / "t.parquet", **options),
    )


def test_captions_come_from_columns_and_lists(images):
    table = {
        "id": ["a", "b", "sub/c", "odd.v1", "gone", "a"],
        "caption": [["one", "two"], None, ["  "], ["odd"], ["x"], ["again"]],
        "short": ["s", "fallback", None, "s", "x", "x"],
    }
    dataset = _dataset(images, table, fallback_caption_column="short")
    assert captions(dataset) == {
        "a.png": ("one", "two"),
        "b.png": ("fallback",),
        "odd.v1.png": ("odd",),
    }
    assert reasons(dataset) == {"sub/c.png": "the table holds no caption for it"}
    assert any("1 rows" in note and "have no image (gone)" in note for note in dataset.scan.notes)
    assert any("repeat a name" in note and "(a)" in note for note in dataset.scan.notes)


def test_images_without_a_row_are_named(images):
    dataset = _dataset(images, {"id": ["a.png"], "caption": ["one"]})
    assert captions(dataset) == {"a.png": ("one",)}
    assert set(reasons(dataset).values()) == {"has no row in the table"}
    assert len(reasons(dataset)) == 3
    assert dataset.scan.found == 4
    # with discovery, the folder says which images there are
    dataset = _dataset(images, {"id": ["a.png"], "caption": ["one"]}, metadata="discovery")
    assert set(reasons(dataset).values()) == {"the table holds no caption for it"}


def test_names_may_have_to_hold_the_extension(images):
    table = {"id": ["a", "b.png"], "caption": ["one", "two"]}
    assert captions(_dataset(images, table, identifier_includes_extension=True)) == {
        "b.png": ("two",)
    }


def test_a_size_that_is_not_the_images_is_told(images):
    table = {"id": ["a", "b"], "caption": ["x", "y"], "w": [64.0, float("nan")], "h": [64, None]}
    sized = {"width_column": "w", "height_column": "h"}
    assert not _dataset(images, table, **sized).scan.notes
    table["h"] = [32, None]
    dataset = _dataset(images, table, **sized)
    assert any("another size than the table" in note and "a.png" in note
               for note in dataset.scan.notes)  # fmt: skip
    assert len(captions(dataset)) == 2


def test_a_table_that_changes_counts_at_once(images):
    assert captions(_dataset(images, {"id": ["a"], "caption": ["x"]})) == {"a.png": ("x",)}
    assert captions(_dataset(images, {"id": ["a"], "caption": ["y"]})) == {"a.png": ("y",)}


def test_an_empty_table(images):
    empty = pyarrow.array([], pyarrow.string())
    dataset = _dataset(images, {"id": empty, "caption": empty})
    assert captions(dataset) == {} and len(reasons(dataset)) == 4


def test_a_missing_column_is_named_with_those_there_are(images):
    with pytest.raises(ValueError, match=r'set0.*no column "caption".*it has "id", "text"'):
        _dataset(images, {"id": ["a"], "text": ["x"]})


def test_a_file_that_is_no_table(images):
    (images / "bad.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"bad\.parquet: can't be read as a Parquet table"):
        surveyed(
            images, caption_strategy="parquet", parquet=ParquetTable(path=images / "bad.parquet")
        )
