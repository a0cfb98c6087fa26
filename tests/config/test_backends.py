"""Where datasets lie: the keys of each type, missing packages, and secrets that stay hidden."""

import importlib.util
from pathlib import Path

import pytest
from dataset_cases import IMAGE, TEXT, load_entries, only, refused_entries

from fluxfast.config.backends import Bucket, CsvFile, HuggingFaceDataset, RemoteFolder

BASE = {name: value for name, value in IMAGE.items() if name != "instance_data_dir"}
BUCKET = {**BASE, "type": "aws", "aws_bucket_name": "pictures"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_each_type_has_an_origin_and_a_folder_in_the_cache():
    csv = {**BASE, "id": "web", "type": "csv", "csv_file": "a.csv", "csv_cache_dir": "web"}
    remote = {**BASE, "id": "remote", "instance_data_dir": "memory://pictures/cats"}
    bucket, web, store = load_entries([BUCKET, csv, remote, TEXT]).images
    assert isinstance(bucket.origin, Bucket) and bucket.origin.aws_bucket_name == "pictures"
    assert bucket.instance_data_dir.match("cache/images/cats-*")
    assert isinstance(web.origin, CsvFile) and web.instance_data_dir == Path("web")
    assert store.origin == RemoteFolder(url="memory://pictures/cats")
    assert store.instance_data_dir.match("cache/images/remote-*")


def test_the_keys_in_huggingface_may_stand_beside_it():
    entry = {**BASE, "type": "huggingface", "dataset_name": "a/b"}
    nested = entry | {"huggingface": {"caption_column": "text", "filter_func": {"min_width": 9}}}
    flat = entry | {"caption_column": "text", "filter_func": {"min_width": 9}}
    (one,), (other,) = (load_entries([each, TEXT]).images for each in (nested, flat))
    assert one.origin == other.origin
    assert isinstance(one.origin, HuggingFaceDataset) and one.origin.caption_column == "text"


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"streaming": True}, ['"streaming" is not implemented yet']),
        ({"huggingface": {"colour": 1}}, ['"huggingface.colour" is not a key']),
        ({"filter_func": {"min_widht": 1}}, ['"filter_func.min_widht"', "min_width"]),
        (
            {"composite_image_config": {"enabled": True, "image_count": 2, "select_index": 2}},
            ['"select_index" (2) must be less'],
        ),
        ({"caption_strategy": "csv"}, ['"caption_strategy" is "csv"', 'needs "type": "csv"']),
    ],
)
def test_problems_of_hugging_face_datasets(keys, parts):
    entry = {**BASE, "type": "huggingface", "dataset_name": "a/b"} | keys
    only(refused_entries([entry, TEXT]), 'dataset "cats"', *parts)


@pytest.mark.parametrize(
    ("package", "keys"),
    [
        ("s3fs", {"type": "aws", "aws_bucket_name": "b"}),
        ("datasets", {"type": "huggingface", "dataset_name": "a/b"}),
        (
            "pyarrow",
            {
                "instance_data_dir": "x",
                "caption_strategy": "parquet",
                "parquet": {"path": "a.parquet"},
            },
        ),
        ("s3fs", {"instance_data_dir": "s3://bucket/prefix"}),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, keys):
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else known(name, *a)
    )
    extra = {"s3fs": "s3", "datasets": "datasets", "pyarrow": "parquet"}[package]
    only(
        refused_entries([BASE | keys, TEXT]), f"needs {package}", f'pip install "fluxfast[{extra}]"'
    )


def test_secrets_are_not_told():
    secrets = {"aws_access_key_id": "AKIASECRET", "aws_secret_access_key": "hush"}
    (image,) = load_entries([BUCKET | secrets, TEXT]).images
    for told in (repr(image), str(image.model_dump()), image.model_dump_json()):
        assert "AKIASECRET" not in told and "hush" not in told
    problem = refused_entries([BUCKET | {"aws_secret_access_key": ["hush"]}, TEXT])
    only(problem, '"aws_secret_access_key" must be text')
    assert "hush" not in problem[0]


def test_the_text_cache_is_local():
    text = {**TEXT, "type": "aws", "aws_bucket_name": "b"}
    only(refused_entries([IMAGE, text]), "the text cache is a folder of this machine")


def test_what_has_no_effect_with_a_bucket_is_said():
    notes = load_entries([BUCKET | {"instance_data_dir": "a", "cache_dir_vae": "vae"}, TEXT]).notes
    assert len(notes) == 2
    assert '"instance_data_dir" has no effect' in notes[0]
    assert '"cache_dir_vae" is a folder of this machine' in notes[1]
