import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from fluxfast.config.datasets import DatasetDefaults, ImageDataset, TextEmbeds, load_data_config
from fluxfast.config.settings import ConfigError

QUICKSTART = Path(__file__).parents[1] / "fixtures" / "quickstart"
IMAGE = {"id": "cats", "type": "local", "instance_data_dir": "datasets/cats"}
TEXT = {
    "id": "text",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def load_entries(entries, **defaults):
    Path("data.json").write_text(json.dumps(entries))
    return load_data_config("data.json", defaults=DatasetDefaults(**defaults))


def load(**keys):
    """The one dataset of a file in which it has these keys."""
    return load_entries([{**IMAGE, **keys}, TEXT]).images[0]


def refused_entries(entries):
    with pytest.raises(ConfigError) as caught:
        load_entries(entries)
    return caught.value.problems


def refused(**keys):
    return refused_entries([{**IMAGE, **keys}, TEXT])


def only(problems, *parts):
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems[0]


def test_the_quickstart_file_loads():
    config = load_data_config(QUICKSTART / "multidatabackend.json", defaults=DatasetDefaults())
    photos, subject, small = config.images
    assert (photos.id, subject.id, small.id) == (
        "pseudo-camera-10k-flux",
        "dreambooth-subject",
        "dreambooth-subject-512",
    )
    assert (photos.crop, photos.crop_style, photos.crop_aspect, photos.caption_strategy) == (
        True,
        "center",
        "square",
        "filename",
    )
    assert (photos.is_regularisation_data, subject.is_regularisation_data) == (True, False)
    assert (subject.repeats, subject.crop, subject.crop_style) == (1000, False, "random")
    assert subject.instance_prompt == "the name of your subject goes here"
    assert subject.instance_data_dir == Path("datasets/dreambooth-subject")
    assert (small.resolution, small.resolution_type) == (512.0, "pixel_area")
    assert (small.minimum_image_size, small.maximum_image_size, small.target_downsample_size) == (
        512.0,
        512.0,
        512.0,
    )
    assert config.text_embeds.cache_dir == Path("cache/text/flux")
    assert config.text_embeds.write_batch_size == 128
    assert config.notes == ()


def test_defaults():
    config = load_entries(
        [IMAGE, {"dataset_type": "text_embeds", "id": "t"}], cache_dir=Path("c"), write_batch_size=7
    )
    image = config.images[0]
    assert (image.resolution, image.resolution_type, image.caption_strategy) == (
        1024.0,
        "pixel_area",
        "filename",
    )
    assert (image.crop, image.repeats, image.probability, image.start_epoch, image.end_step) == (
        False,
        0,
        1.0,
        1,
        None,
    )
    assert image.cache_dir_vae == Path("c/vae/cats")
    assert config.text_embeds == TextEmbeds(
        id="t", dataset_type="text_embeds", cache_dir=Path("c/text"), write_batch_size=7
    )


def test_the_runs_values_stand_in():
    run = {
        "resolution": 1.0,
        "resolution_type": "area",
        "caption_strategy": "textfile",
        "instance_prompt": "x",
        "prepend_instance_prompt": True,
    }
    plain, own = load_entries(
        [
            IMAGE,
            {**IMAGE, "id": "own", "resolution": 0.5, "prepend_instance_prompt": "false"},
            TEXT,
        ],
        **run,
    ).images
    assert (plain.resolution, plain.resolution_type, plain.caption_strategy) == (
        1.0,
        "area",
        "textfile",
    )
    assert (plain.instance_prompt, plain.prepend_instance_prompt) == ("x", True)
    assert (own.resolution, own.prepend_instance_prompt) == (0.5, False)


def test_every_field_is_described():
    for model in (ImageDataset, TextEmbeds):
        assert all(field.description for field in model.model_fields.values())


def test_it_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load().repeats = 3


@pytest.mark.parametrize(
    ("written", "value"),
    [("False", False), ("false", False), ("True", True), (True, True), (None, False)],
)
def test_string_booleans(written, value):
    assert load(crop=written).crop is value


def test_strings_for_numbers():
    image = load(resolution="512", repeats="3", max_num_samples="", minimum_image_size="0")
    assert (image.resolution, image.repeats, image.max_num_samples, image.minimum_image_size) == (
        512.0,
        3,
        None,
        None,
    )


def test_other_names():
    assert load(is_regularization_data="true").is_regularisation_data is True
    assert load(crop_style="centre").crop_style == "center"
    assert (
        load(caption_strategy="instance_prompt", instance_prompt="a cat").caption_strategy
        == "instanceprompt"
    )
    for backend in ("json", "filesystem"):
        assert load(metadata_backend=backend).metadata_backend == "discovery"
    moved = {key: value for key, value in IMAGE.items() if key != "instance_data_dir"} | {
        "instance_data_root": "datasets/dogs"
    }
    assert load_entries([moved, TEXT]).images[0].instance_data_dir == Path("datasets/dogs")
    only(
        refused(is_regularization_data=True, is_regularisation_data=True),
        "is_regularization_data",
        "is_regularisation_data",
        "same key",
    )


def test_placeholders(monkeypatch):
    monkeypatch.setenv("IMAGES", "/photos")
    image = load(
        instance_data_dir="{env:IMAGES}/cats", cache_dir_vae="cache/vae/{model_family}/cats"
    )
    assert (image.instance_data_dir, image.cache_dir_vae) == (
        Path("/photos/cats"),
        Path("cache/vae/flux/cats"),
    )
    (image,) = load_entries(
        [{**IMAGE, "cache_dir_vae": "{output_dir}/{id}"}, TEXT], output_dir=Path("runs")
    ).images
    assert image.cache_dir_vae == Path("runs/cats")
    monkeypatch.delenv("IMAGES")
    only(
        refused(instance_data_dir="{env:IMAGES}/cats"),
        'dataset "cats" "instance_data_dir"',
        "IMAGES",
        "not set",
    )


@pytest.mark.parametrize("key", ["disabled", "disable"])
def test_disabled_entries_are_not_looked_at(key):
    other = {"id": "other", "type": "aws", "no_such_key": 1, key: "true"}
    config = load_entries([IMAGE, other, TEXT])
    assert [image.id for image in config.images] == ["cats"]
    assert any('"other"' in note for note in config.notes)
    assert load(**{key: "false"})


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"id": "a\nb"}, ['"id"', "can't be printed"]),
        (
            {"type": "aws", "aws_bucket_name": "b", "unknown": 1},
            ['"type"', '"aws"', "not implemented yet"],
        ),
        ({"type": "aws"}, ['"type"', '"aws"', "not implemented yet", "'local'"]),
        ({"type": "huggingface"}, ['"type"', "not implemented yet"]),
        (
            {"dataset_type": "conditioning"},
            ['"dataset_type"', '"conditioning"', "not implemented yet"],
        ),
        ({"dataset_type": "eval"}, ['"dataset_type"', "not implemented yet"]),
        ({"dataset_type": "video"}, ['"dataset_type"', "not implemented yet"]),
        (
            {"crop_style": "face"},
            ['"crop_style"', "not implemented yet", "'random', 'center' or 'corner'"],
        ),
        ({"caption_strategy": "parquet"}, ['"caption_strategy"', "not implemented yet"]),
        ({"metadata_backend": "parquet"}, ['"metadata_backend"', "not implemented yet"]),
        ({"conditioning_data": "masks"}, ['"conditioning_data" is "masks"', "not implemented yet"]),
        ({"caption_shuffle": {"enable": True}}, ['"caption_shuffle"', "not implemented yet"]),
        (
            {"vae_cache_clear_each_epoch": True},
            ['"vae_cache_clear_each_epoch"', "not implemented yet"],
        ),
        ({"vae_cache_disable": "true"}, ['"vae_cache_disable"', "not implemented yet"]),
        ({"delete_unwanted_images": True}, ['"delete_unwanted_images"', "not implemented yet"]),
        ({"max_upscale_threshold": 0.2}, ['"max_upscale_threshold"', "not implemented yet"]),
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
            ['"crop_style" is "middle"', "must be 'random', 'center' or 'corner'"],
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
        ("disable_validation", True),
        ("scan_for_errors", True),
        ("vae_cache_scan_behaviour", "recreate"),
        ("read_batch_size", 25),
        ("image_processing_batch_size", 32),
        ("compress_cache", True),
        ("ignore_epochs", True),
        ("parquet", {"path": "x"}),
        ("write_batch_size", 3),
    ],
)
def test_what_has_no_effect_is_said(key, value):
    (note,) = load_entries([{**IMAGE, key: value}, TEXT]).notes
    assert f'dataset "cats": "{key}" has no effect' in note


def test_sizes_and_filters():
    assert load(resolution=0.5, resolution_type="area").resolution == 0.5
    assert (
        load(
            resolution_type="pixel", maximum_image_size=512, target_downsample_size=512
        ).maximum_image_size
        == 512.0
    )
    assert load(crop_aspect="random", crop_aspect_buckets=[1, "0.5"]).crop_aspect_buckets == (
        1.0,
        0.5,
    )
    weighted = load(
        crop_aspect="random", crop_aspect_buckets=[{"aspect_bucket": 0.5, "weight": 1.0}]
    )
    assert weighted.crop_aspect_buckets == ({"aspect": 0.5, "weight": 1.0},)
    # an entry may end in a space, and hold what other programs take for a line's end
    Path("filters.txt").write_bytes("bad \n\nworse\u2028\r\n".encode())
    assert load(caption_filter_list="filters.txt").caption_filter_list == ("bad ", "worse\u2028")
    Path("filters.json").write_text('["bad", "worse"]')
    assert load(caption_filter_list="filters.json").caption_filter_list == ("bad", "worse")
    assert load(caption_filter_list=["a"]).caption_filter_list == ("a",)


def test_the_text_caches_filters_are_for_datasets_without_their_own():
    # where SimpleTuner has them
    text = {**TEXT, "caption_filter_list": ["x"]}
    first, second = load_entries(
        [IMAGE, {**IMAGE, "id": "own", "caption_filter_list": ["y"]}, text]
    ).images
    assert (first.caption_filter_list, second.caption_filter_list) == (("x",), ("y",))


def test_a_dataset_may_have_its_own_batch_and_threads():
    image = load(vae_batch_size=1, max_workers="3")
    assert (image.vae_batch_size, image.max_workers) == (1, 3)
    assert (load().vae_batch_size, load().max_workers) == (None, None)


def test_folders_that_are_not_utf8():
    raw = b"datasets/M\xfcnchen"
    image = load(instance_data_dir=raw.decode(errors="surrogateescape"))
    assert os.fsencode(image.instance_data_dir) == raw


def test_an_id_that_no_folder_can_have_keeps_its_cache_inside():
    folders = {
        load(id=id, cache_dir_vae="").cache_dir_vae
        for id in ("..", ".", "../../etc", "a/b", "a:b", "x" * 300)
    }
    assert {folder.parent for folder in folders} == {Path("cache/vae")}
    assert len(folders) == 6


# every key that SimpleTuner's loader reads of an entry of any kind, beside those that the other
# tests name
KNOWN = """
aws aws_access_key_id aws_bucket_name aws_data_prefix aws_endpoint_url aws_max_pool_connections
aws_region_name aws_secret_access_key aws_session_token audio auto_load bbox_column buffer_size
cache_dir_conditioning_image_embeds caption_column caption_file_extensions caption_shuffle
composite_image_column conditioning conditioning_config conditioning_data conditioning_image_embeds
conditioning_type config_version csv csv_cache_dir csv_caption_column csv_file csv_url_column
dataset_name delete_nsfw_images delete_problematic_images delete_unwanted_images description_column
disable_after_epoch_step distillation_cache distillation_type end_epoch end_step
fallback_caption_column filter_func grounding grounding_data hf_token huggingface image_column
image_embeds is_regularization_data lyrics_column max_file_size max_upscale_threshold
memory_filesystem_path memory_filesystem_size memory_filesystem_sudo metadata metadata_cache_dir
metadata_update_interval num_proc optimise_captions optimize_captions parallel_downloads parquet
preserve_data_backend_cache quality_column revision s2v_datasets shard_cache_dir shard_cache_gb
shorten_filenames skip_file_discovery slider_strength source source_dataset_id split
split_composite_images streaming subfolder text_cache_disable text_cache_ondemand
timestep_sampling_offset truncation_mode vae_cache_clear_each_epoch vae_cache_disable
vae_cache_ondemand video video_column webshart webshart_optimise_captions webshart_optimize_captions
write_batch_size
"""


def test_no_key_of_simpletuners_loader_is_unknown():
    problems = refused(**dict.fromkeys([*KNOWN.split(), "no_such_key"], 1))
    only([problem for problem in problems if "is not a key" in problem], '"no_such_key"')
    assert all(
        "not implemented yet" in problem or '"no_such_key"' in problem for problem in problems
    ), problems


# the entry that SimpleTuner's shipped flux.peft-lora trains on, and the same with a folder of one's
# own
DOMOKUN = {
    "id": "dreambooth-512", "type": "huggingface", "dataset_name": "RareConcepts/Domokun",
    "crop": True, "crop_style": "random", "crop_aspect": "square", "minimum_image_size": 128,
    "maximum_image_size": 512, "target_downsample_size": 512, "resolution": 512,
    "resolution_type": "pixel", "metadata_backend": "huggingface",
    "caption_strategy": "instanceprompt", "instance_prompt": "x",
    "cache_dir_vae": "cache/vae/{model_family}/dreambooth-512",
}  # fmt: skip


def test_the_shipped_examples_dataset():
    only(refused_entries([DOMOKUN, TEXT]), '"type" is "huggingface"', "not implemented yet")
    local = DOMOKUN | {
        "type": "local",
        "metadata_backend": "discovery",
        "instance_data_dir": "domokun",
    }
    del local["dataset_name"]
    image = load_entries([local, TEXT]).images[0]
    assert (image.cache_dir_vae, image.resolution) == (Path("cache/vae/flux/dreambooth-512"), 512.0)


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


def test_text_cache_entries():
    only(
        refused_entries([IMAGE]),
        "data.json",
        "no entry for the text cache",
        '"dataset_type": "text_embeds"',
    )
    assert load_entries([IMAGE, {**TEXT, "default": False}]).text_embeds.id == "text"
    second = {**TEXT, "id": "second", "default": False}
    assert load_entries([IMAGE, second, TEXT]).text_embeds.id == "text"
    only(
        refused_entries([IMAGE, TEXT, {**second, "default": True}]),
        "exactly one",
        '2 of "text", "second"',
    )
    only(refused_entries([IMAGE, second, {**TEXT, "default": False}]), "exactly one", "0 of")
    assert load(text_embeds="text").text_embeds == "text"
    only(
        refused_entries([{**IMAGE, "text_embeds": "second"}, TEXT, second]),
        '"text_embeds" is "second"',
        "not implemented yet",
    )
    only(refused(text_embeds="nowhere"), '"text_embeds" is "nowhere"', "no text_embeds entry")


def test_the_whole_file():
    only(refused_entries([TEXT]), "no image dataset is enabled")
    only(refused_entries([{**IMAGE, "disabled": True}, TEXT]), "no image dataset is enabled")
    only(refused_entries([IMAGE, {**IMAGE, "instance_data_dir": "y"}, TEXT]), '"cats"', "taken")
    only(refused(start_epoch=2), "from the start")
    only(refused(start_step=5), "from the start")
    only(refused(probability=0), '"probability"')
    assert any(
        "regularisation" in note
        for note in load_entries([{**IMAGE, "is_regularisation_data": True}, TEXT]).notes
    )


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
