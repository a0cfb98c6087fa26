import os
from pathlib import Path

import pytest
from dataset_cases import (
    IMAGE,
    QUICKSTART,
    TEXT,
    load,
    load_entries,
    only,
    refused,
    refused_entries,
)
from pydantic import ValidationError

from fluxfast.config.backends import HuggingFaceDataset
from fluxfast.config.datasets import DatasetDefaults, ImageDataset, TextEmbeds, load_data_config


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


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
    assert image.cache_dir_vae == Path("c/vae")
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


# every key that SimpleTuner's loader reads of an entry of any kind, beside those that the other
# tests name
KNOWN = """
aws aws_access_key_id aws_bucket_name aws_data_prefix aws_endpoint_url aws_max_pool_connections
aws_region_name aws_secret_access_key aws_session_token audio auto_load bbox_column buffer_size
cache_dir_conditioning_image_embeds caption_column caption_file_extensions
composite_image_column conditioning_config conditioning_image_embeds
config_version csv csv_cache_dir csv_caption_column csv_file csv_url_column
dataset_name delete_nsfw_images delete_problematic_images delete_unwanted_images description_column
disable_after_epoch_step distillation_cache distillation_type end_epoch end_step
fallback_caption_column filter_func grounding grounding_data hf_token huggingface image_column
image_embeds is_regularization_data lyrics_column max_file_size
memory_filesystem_path memory_filesystem_size memory_filesystem_sudo metadata metadata_cache_dir
metadata_update_interval num_proc optimise_captions optimize_captions parallel_downloads parquet
preserve_data_backend_cache quality_column revision s2v_datasets shard_cache_dir shard_cache_gb
shorten_filenames skip_file_discovery slider_strength source split
split_composite_images streaming subfolder text_cache_disable text_cache_ondemand
timestep_sampling_offset truncation_mode video video_column webshart
webshart_optimise_captions webshart_optimize_captions write_batch_size
"""


def test_no_key_of_simpletuners_loader_is_unknown():
    problems = refused(**dict.fromkeys([*KNOWN.split(), "no_such_key"], 1))
    only([problem for problem in problems if "is not a key" in problem], '"no_such_key"')
    told = ("not implemented yet", '"no_such_key"', 'is a key of entries whose "type" is')
    wrong = [problem for problem in problems if not any(part in problem for part in told)]
    only(wrong, '"parquet" is 1')


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
    hub = load_entries([DOMOKUN, TEXT]).images[0]
    assert hub.origin == HuggingFaceDataset(dataset_name="RareConcepts/Domokun")
    assert hub.instance_data_dir.parent == Path("cache/images")
    assert hub.instance_data_dir.name.startswith("dreambooth-512-")
    local = DOMOKUN | {
        "type": "local",
        "metadata_backend": "discovery",
        "instance_data_dir": "domokun",
    }
    del local["dataset_name"]
    image = load_entries([local, TEXT]).images[0]
    assert (image.cache_dir_vae, image.resolution) == (Path("cache/vae/flux/dreambooth-512"), 512.0)


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
    only(refused_entries([TEXT]), "no image dataset to train on is enabled")
    held_out = {**IMAGE, "dataset_type": "eval"}
    for image in ({**IMAGE, "disabled": True}, held_out):
        only(refused_entries([image, TEXT]), "no image dataset to train on is enabled")
    data = load_entries([IMAGE, {**held_out, "id": "kept", "repeats": 3}, TEXT])
    assert [each.id for each in data.images] == [IMAGE["id"]]
    assert [each.id for each in data.held_out] == ["kept"]
    assert ["kept" in note and '"repeats"' in note for note in data.notes] == [True]
    only(refused_entries([IMAGE, {**IMAGE, "instance_data_dir": "y"}, TEXT]), '"cats"', "taken")
    only(refused(start_epoch=2), "from the start")
    only(refused(start_step=5), "from the start")
    only(refused(probability=0), '"probability"')
    assert any(
        "regularisation" in note
        for note in load_entries([{**IMAGE, "is_regularisation_data": True}, TEXT]).notes
    )


def test_what_the_run_says_of_latents_and_upscaling():
    run = {"vae_cache_ondemand": True, "vae_cache_disable": True, "max_upscale_threshold": 0.2}
    shapes = {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.0]}
    mine = dict.fromkeys(run, False) | {"max_upscale_threshold": 0.0}
    first, second = load_entries(
        [{**IMAGE, **shapes}, {**IMAGE, **shapes, **mine, "id": "dogs"}, TEXT], **run
    ).images
    assert {name: getattr(first, name) for name in run} == run
    assert {name: getattr(second, name) for name in run} == mine
    assert (first.encodes_on_demand, second.encodes_on_demand) == (True, False)
