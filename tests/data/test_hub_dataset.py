"""Hugging Face datasets, from local files: rows, filters, captions, and what is wrong with them."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from backend_cases import captions, png, reasons, surveyed

import fluxfast.data.hub_dataset as hub_dataset
from fluxfast.config.backends import CompositeImage, HuggingFaceDataset, QualityFilter


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def _table(tmp_path, columns, name="rows.parquet"):
    path = tmp_path / "data" / name
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _cells(*contents):
    return [content and {"bytes": content, "path": None} for content in contents]


def _dataset(tmp_path, name, **options):
    keys = {"type": "huggingface", "caption_strategy": options.pop("strategy", "huggingface")}
    return surveyed(tmp_path, origin=HuggingFaceDataset(dataset_name=str(name), **options), **keys)


@pytest.fixture
def written(monkeypatch):
    rows, write = [], hub_dataset._write

    def counting(table, index, *rest):
        rows.append(index)
        write(table, index, *rest)

    monkeypatch.setattr(hub_dataset, "_write", counting)
    return rows


def test_rows_become_images_once(tmp_path, written):
    cells = _cells(png(seed=1), png(seed=2), None, b"no image", png(seed=3))
    text = ["one", ["two"], "x", "x", None]
    path = _table(
        tmp_path,
        {
            "image": cells,
            "caption": [[t] if isinstance(t, str) else t for t in text],
            "short": ["s"] * 5,
            "long": ["l"] * 5,
        },
    )
    options = {"fallback_caption_column": "short", "description_column": "long"}
    dataset = _dataset(tmp_path, path, **options)
    assert captions(dataset) == {
        "00000000.png": ("one",),
        "00000001.png": ("two",),
        "00000004.png": ("s",),
    }
    told = reasons(dataset)
    assert "its row has no image" in told["00000002.png"]
    assert "not an image" in told["00000003.png"]
    assert sorted(written) == [0, 1, 2, 3, 4]
    written.clear()
    assert captions(_dataset(tmp_path, path, **options)) == captions(dataset)
    # only the row without an image is tried again
    assert written == [2]


def test_a_folder_is_read_and_changes_count(tmp_path, written):
    path = _table(tmp_path, {"image": _cells(png(seed=1)), "caption": ["one"]})
    (before,) = _dataset(tmp_path, path.parent).scan.candidates
    _table(tmp_path, {"image": _cells(png(seed=2)), "caption": ["another"]})
    (after,) = _dataset(tmp_path, path.parent).scan.candidates
    assert (before.captions, after.captions) == (("one",), ("another",))
    assert before.sha256 != after.sha256


def test_a_json_file_names_images_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png())
    path = tmp_path / "data" / "rows.jsonl"
    path.write_text('{"image": "a.png", "caption": "one"}\n{"image": "gone.png", "caption": "x"}\n')
    dataset = _dataset(tmp_path, path)
    assert captions(dataset) == {"00000000.png": ("one",)}
    assert "can't be read" in reasons(dataset)["00000001.png"]


def test_filters_choose_rows(tmp_path):
    path = _table(
        tmp_path,
        {
            "image": _cells(*(png(seed=i) for i in range(5))),
            "caption": ["a", "b", "c", "d", "e"],
            "collection": ["photo", "art", "photo", "photo", "photo"],
            "quality_assessment": [{"sharp": q} for q in (0.9, 0.9, 0.1, 0.9, None)],
            "width": [64, 64, 64, 8, 64],
        },
    )
    filters = QualityFilter(collection=("photo",), quality_thresholds={"sharp": 0.5}, min_width=32)
    dataset = _dataset(tmp_path, path, filter_func=filters)
    assert captions(dataset) == {"00000000.png": ("a",)}
    assert any("1 of 5 rows are used" in note for note in dataset.scan.notes)
    with pytest.raises(ValueError, match=r'"height" .*min_height'):
        _dataset(tmp_path, path, filter_func=QualityFilter(min_height=1))


def test_one_of_several_images_side_by_side(tmp_path):
    path = _table(tmp_path, {"image": _cells(png(129, 64)), "caption": ["x"]})
    sizes = [
        _dataset(
            tmp_path,
            path,
            composite_image_config=CompositeImage(enabled=True, image_count=2, select_index=i),
        ).scan.candidates[0]
        for i in (0, 1)
    ]
    assert [each.size for each in sizes] == [(64, 64), (65, 64)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_column": "picture"}, '"picture".*"image_column".*it has "image", "caption"'),
        ({"caption_column": "text"}, 'no column "text"'),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(tmp_path, options, told):
    path = _table(tmp_path, {"image": _cells(png()), "caption": ["x"]})
    with pytest.raises(ValueError, match=told):
        _dataset(tmp_path, path, **options)


def test_other_strategies_need_no_caption_column(tmp_path):
    path = _table(tmp_path, {"image": _cells(png())})
    assert captions(_dataset(tmp_path, path, strategy="filename")) == {
        "00000000.png": ("00000000",)
    }


def test_what_can_not_be_loaded(tmp_path, monkeypatch):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"set0.*bad\.parquet: can't be loaded"):
        _dataset(tmp_path, bad)
    monkeypatch.setattr(datasets, "load_dataset", _refuses)
    with pytest.raises(ValueError, match=r"a/b: can't be loaded: token \*\*\* is refused"):
        _dataset(tmp_path, "a/b", auth_token="hush")


def _refuses(*_, token, **__):
    raise OSError(f"token {token} is refused")


def test_a_dataset_from_elsewhere_chooses_no_file_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "private.png").write_bytes(png(seed=1))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "downloaded.png").write_bytes(png(seed=2))
    files = [str(tmp_path / name) for name in ("private.png", "hub/downloaded.png")]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    dataset = _dataset(tmp_path, "a/b", strategy="filename")
    assert list(captions(dataset)) == ["00000001.png"]
    assert "only a local dataset may" in reasons(dataset)["00000000.png"]
