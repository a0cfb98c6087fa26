import importlib.util
from pathlib import Path

import pytest
from dataset_cases import IMAGE, TEXT, load_entries, only, refused, refused_entries

from fluxfast.config.datasets import DatasetDefaults, load_data_config
from fluxfast.config.settings import ConfigError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"id": "a\nb"}, ['"id"', "can't be printed"]),
        (
            {"type": "aws", "aws_bucket_name": "b", "unknown": 1},
            ['"unknown" is not a key'],
        ),
        ({"type": "aws"}, ['"aws_bucket_name" is required']),
        ({"type": "huggingface"}, ['"dataset_name" is required']),
        ({"type": "csv"}, ['"csv_file" is required']),
        ({"type": "webshart"}, ['"type"', "not implemented yet", "csv"]),
        ({"csv_file": "a.csv"}, ['"csv_file"', '"type" is "csv"']),
        ({"dataset_type": "video"}, ['"dataset_type"', "not implemented yet"]),
        ({"caption_strategy": "parquet"}, ['"caption_strategy" is "parquet"', 'needs "parquet"']),
        ({"metadata_backend": "parquet"}, ['"metadata_backend" is "parquet"', 'needs "parquet"']),
        ({"metadata_backend": "webshart"}, ['"metadata_backend"', "not implemented yet"]),
        ({"parquet": {"path": "x", "paht": 1}}, ['"parquet.paht" is not a key', "parquet.path"]),
        ({"instance_data_dir": "s4://b/c"}, ['"instance_data_dir"', "no store is known by s4://"]),
        ({"instance_data_dir": "ftp://me:pw@b/c"}, ['"instance_data_dir" holds a user']),
        (
            {"conditioning_data": "masks"},
            ['"conditioning_data" names "masks"', "there is no dataset with this id"],
        ),
        ({"conditioning_type": "controlnet"}, ['"conditioning_type"', "not implemented yet"]),
        ({"dataset_type": "conditioning"}, ['"conditioning_type" is required']),
        ({"caption_shuffle": 3}, ['"caption_shuffle" is 3']),
        (
            {"caption_shuffle": {"enable": True, "count": 0}},
            ['"caption_shuffle.count" is 0', "greater than or equal to 1"],
        ),
        (
            {"caption_shuffle": {"enable": True, "split_on": ";"}},
            ['"caption_shuffle.split_on" is ";"', "must be 'comma', 'space' or 'period'"],
        ),
        (
            {"caption_shuffle": {"enable": True, "cuont": 3}},
            ['"caption_shuffle.cuont"', 'not a key; did you mean "caption_shuffle.count"?'],
        ),
        ({"vae_cache_clear_each_epoch": "no way"}, ['"vae_cache_clear_each_epoch"', "no way"]),
        ({"text_cache_ondemand": "true"}, ['"text_cache_ondemand"', "not implemented yet"]),
        ({"delete_unwanted_images": True}, ['"delete_unwanted_images"', "not implemented yet"]),
        ({"max_upscale_threshold": 20}, ['"max_upscale_threshold" is 20', "less than or equal"]),
        ({"dataset_type": "grounding"}, ['"dataset_type"', "not implemented yet"]),
        ({"grounding": {"enabled": True}}, ['"grounding"', "not implemented yet"]),
        ({"hf_token": "x"}, ['"hf_token"', "not implemented yet"]),
        (
            {"instance_prompt": "half \ud800"},
            ['"instance_prompt"', "half of a character (\\ud800)"],
        ),
        ({"instance_prompt": "M\udcfcnchen"}, ['"instance_prompt"', "no UTF-8 (\\xfc)"]),
        ({"instance_data_dir": "a\0b"}, ['"instance_data_dir"', "zero character"]),
        ({"instance_data_dir": "a\ud800"}, ['"instance_data_dir"', "half of a character"]),
        ({"caption_filter_list": ["a\ud800"]}, ['"caption_filter_list"', "half of a character"]),
        ({"caption_filter_list": "gone.json"}, ['"caption_filter_list"', "gone.json"]),
        ({"vae_batch_size": 0}, ['"vae_batch_size"']),
        ({"dataset_type": "imag"}, ['"dataset_type"', 'did you mean "image"?']),
        ({"crop_styl": "center"}, ['"crop_styl"', 'did you mean "crop_style"?']),
        ({"cache_dir": "x"}, ['"cache_dir"', "text_embeds"]),
        ({"crop": "maybe"}, ['"crop" is "maybe"']),
        ({"repeats": -1}, ['"repeats" is -1']),
        ({"repeats": True}, ['"repeats" is true']),
        (
            {"crop_style": "middle"},
            ['"crop_style" is "middle"', "must be 'random', 'center', 'corner' or 'face'"],
        ),
        ({"disabled": "perhaps"}, ['"disabled"', "true or false"]),
        (
            {"resolution": 1024, "resolution_type": "area"},
            ['"resolution" is 1024 megapixels', "pixel_area"],
        ),
        ({"resolution": 0.5}, ['"resolution"', "0.5 pixels", '"area"']),
        (
            {"resolution_type": "pixel", "maximum_image_size": 511, "target_downsample_size": 512},
            ['"maximum_image_size"', "at least 512"],
        ),
        ({"maximum_image_size": 1024}, ['"maximum_image_size" needs "target_downsample_size"']),
        (
            {"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1},
            ['"minimum_aspect_ratio" (2)', '"maximum_aspect_ratio" (1)'],
        ),
        ({"crop_aspect": "closest"}, ['"crop_aspect" closest needs "crop_aspect_buckets"']),
        ({"crop_aspect_buckets": [0]}, ['"crop_aspect_buckets"', "larger than 0"]),
        ({"crop_aspect_buckets": ["wide"]}, ['"crop_aspect_buckets"', "wide"]),
        (
            {"crop_aspect_buckets": [{"aspect_bucket": 1.0, "weight": 0.5}]},
            ["weights [0.5]", "add up to 1"],
        ),
        ({"crop_aspect_buckets": [{"aspect_bucket": 0, "weight": 1}]}, ["larger than 0"]),
        ({"crop_aspect_buckets": [{"aspect_bucket": 1.0, "weight": 0.5}, 2.0]}, ["for each"]),
        ({"caption_filter_list": ["("]}, ['"caption_filter_list"', "regular expression"]),
        (
            {"caption_strategy": "instanceprompt"},
            ['"caption_strategy" is "instanceprompt": needs an "instance_prompt"'],
        ),
        ({"prepend_instance_prompt": True}, ['"prepend_instance_prompt"', '"instance_prompt"']),
        ({"only_instance_prompt": "true"}, ['"only_instance_prompt"', '"instance_prompt"']),
        ({"start_step": 10, "end_step": 5}, ['"end_step" (5)', '"start_step" (10)']),
        ({"caption_filter_list": "gone.txt"}, ['"caption_filter_list"', "gone.txt"]),
    ],
)
def test_problems_name_file_dataset_and_key(keys, parts):
    id = keys.get("id", "cats").encode("unicode_escape").decode()
    only(refused(**keys), f'data.json: dataset "{id}": ', *parts)


@pytest.mark.parametrize(
    "keys",
    [
        {"conditioning_data": None},
        {"conditioning_data": ""},
        {"conditioning": []},
        {"caption_shuffle": {"enable": False, "count": 3}},
        {"grounding": {"enabled": False}},
        {"split": "train", "image_column": "image"},
        {"vae_cache_clear_each_epoch": "false"},
        {"vae_cache_disable": False},
        {"delete_unwanted_images": False},
        {"max_upscale_threshold": None},
        {"skip_file_discovery": ""},
        {"crop_aspect_buckets": []},
        {"__open__": True},
    ],
)
def test_what_is_off_is_accepted_without_a_word(keys):
    assert load_entries([{**IMAGE, **keys}, TEXT]).notes == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("skip_file_discovery", "vae aspect"),
        ("hash_filenames", True),
        ("cache_file_suffix", "square"),
        ("scan_for_errors", True),
        ("vae_cache_scan_behaviour", "recreate"),
        ("read_batch_size", 25),
        ("image_processing_batch_size", 32),
        ("compress_cache", True),
        ("ignore_epochs", True),
        ("parquet", {"path": "x"}),
        ("write_batch_size", 3),
        ("max_upscale_threshold", 0.2),
    ],
)
def test_what_has_no_effect_is_said(key, value):
    (note,) = load_entries([{**IMAGE, key: value}, TEXT]).notes
    assert f'dataset "cats": "{key}" has no effect' in note


def test_faces_need_a_detector(monkeypatch, tmp_path):
    # OpenCV 5 is there, and has no detector
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").touch()
    for package in (None, "cv2"):
        path = tmp_path / "cv2" / "__init__.py"
        spec = package and importlib.util.spec_from_file_location("cv2", path)
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        only(
            refused(crop_style="face"),
            'data.json: dataset "cats": "crop_style" is "face"',
            'not installed: pip install "fluxfast[faces]", or set "crop_style": "center"',
        )
    data = tmp_path / "cv2" / "data"
    data.mkdir()
    (data / "haarcascade_frontalface_default.xml").touch()
    assert load_entries([{**IMAGE, "crop_style": "face"}, TEXT]).images[0].crop_style == "face"


def test_new_crops_that_are_the_old_ones_are_said():
    keys = {**IMAGE, "vae_cache_clear_each_epoch": True}
    assert load_entries([keys, TEXT]).notes == ()
    (note,) = load_entries([{**keys, "crop_style": "center"}, TEXT]).notes
    assert '"vae_cache_clear_each_epoch" encodes each image anew and gives the same' in note
    shapes = {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.5]}
    assert load_entries([{**keys, "crop_style": "center", **shapes}, TEXT]).notes == ()


def test_every_entrys_problems_come_together():
    problems = refused_entries([
        {**IMAGE, "croop": 1, "repeats": "x"}, {**IMAGE, "type": "csv"}, 3,
        {"instance_data_dir": "y"}, {"id": "z"}, {**TEXT, "crop": True},
    ])  # fmt: skip
    parts = (
        "croop",
        "repeats",
        "csv",
        "taken",
        "entry 3",
        'entry 4: "id" is required',
        'dataset "z": "instance_data_dir" is required',
        'dataset "text": "crop"',
    )
    for part in parts:
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == len(parts)
    assert all(problem.startswith("data.json: ") for problem in problems)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{}", ["must hold a list"]),
        ("null", ["must hold a list"]),
        ('[{"id": "a"},]', ["data.json:1:", "comma after the last entry"]),
        ('[{"id": "a", "id": "b"}]', ['"id"', "more than once"]),
        ("[]", ["text cache", "no image dataset"]),
    ],
)
def test_broken_files(text, parts):
    Path("data.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_data_config("data.json", defaults=DatasetDefaults())
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"gone\.json: no such file"):
        load_data_config("gone.json", defaults=DatasetDefaults())
