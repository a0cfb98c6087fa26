"""Where caches lie: in one place for all runs, unless the config or an earlier version says."""

from pathlib import Path

import pytest
from dataset_cases import load as load_dataset

from config_helpers import load
from fluxfast.config.cache_folders import images_folder, latents_folder
from fluxfast.files import user_cache


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def test_all_runs_have_one(tmp_path):
    assert load(output_dir="a").cache_dir == load(output_dir="b").cache_dir
    assert load().cache_dir == tmp_path / "user" / "fluxfast"
    assert load(cache_dir="mine").cache_dir == Path("mine")


def test_without_the_variable_it_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "fluxfast"


def test_what_an_earlier_version_left_goes_on_being_used():
    Path("o/cache/vae/cats").mkdir(parents=True)
    config = load(output_dir="o")
    assert config.cache_dir == Path("o/cache")
    assert sum("which an earlier version made" in note for note in config.notes) == 1
    assert load_dataset(id="cats", cache_dir_vae="").cache_dir_vae == Path("cache/vae")
    assert latents_folder(config.cache_dir, "cats") == Path("o/cache/vae/cats")
    assert latents_folder(config.cache_dir, "dogs") == Path("o/cache/vae")
    assert not any("earlier version" in note for note in load(output_dir="new").notes)


def test_images_of_another_origin_have_another_folder():
    bucket = {"aws_bucket_name": "a"}
    folder = images_folder(Path("c"), "images", "cats", bucket)
    assert folder == images_folder(Path("c"), "images", "cats", dict(bucket))
    assert folder != images_folder(Path("c"), "images", "cats", {"aws_bucket_name": "b"})
    Path("c/images/cats").mkdir(parents=True)
    assert images_folder(Path("c"), "images", "cats", bucket) == Path("c/images/cats")


def test_an_id_that_no_folder_can_have_keeps_its_images_inside():
    folders = {
        images_folder(Path("c"), "images", id, {})
        for id in ("..", ".", "../../etc", "a/b", "a:b", "x" * 300)
    }
    assert {folder.parent for folder in folders} == {Path("c/images")}
    assert len(folders) == 6
