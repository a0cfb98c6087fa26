"""Data preparation fills the caches with what they lack, and no more."""

import os
import shutil
import time
import weakref
from dataclasses import replace

import pytest
import torch
from data_fixtures import CLIP_WIDTH, T5_WIDTH, make_pipeline, photo
from prepare_cases import NOTHING, config
from rich.progress import Progress
from safetensors.torch import load

import fluxfast.data.encode as encode
from fluxfast.data.buckets import apply, crop_rng, plan_crop
from fluxfast.data.cache import TensorCache
from fluxfast.data.cache_index import Index, stamp
from fluxfast.data.encode import EncoderSettings
from fluxfast.data.encoders import LatentEncoder, TextEncoders
from fluxfast.data.images import load_image, to_tensor
from fluxfast.data.prepare import prepare

# encoders as small as these only lose time to further threads, and to a collection
pytestmark = pytest.mark.usefixtures("one_thread", "no_collection")


def test_everything_is_cached_as_the_encoders_give_it(tmp_path, folder, settings, pipeline_folder):
    prepared = prepare(config(tmp_path), settings, extra_prompts=["a validation prompt"])
    (dataset,) = prepared.datasets
    files = [
        "sub/tall_0.png",
        "sub/tall_1.png",
        "wide_0.png",
        "wide_1.png",
        "wide_2.png",
        "wide_3.png",
    ]
    assert [sample.file for sample in dataset.samples] == files
    vae = LatentEncoder.from_pretrained((str(pipeline_folder), "vae", None))
    for sample in dataset.samples:
        assert sample.target == ((64, 192) if "tall" in sample.file else (192, 64))
        img = load_image(folder / sample.file)
        planned = plan_crop(img.size, resolution=128, rng=crop_rng(0, dataset.id, sample.file))
        expected = vae.encode(
            to_tensor(apply(img, planned))[None], [int(sample.fingerprint[:15], 16)]
        )[0]
        assert torch.equal(dataset.latents(sample), expected)
    text = TextEncoders.from_pretrained(settings.pipeline, max_length=24)
    for prompt in ["wide 0", "tall 1", "", "a validation prompt"]:
        expected = {name: value[0] for name, value in text.encode([prompt]).items()}
        got = prepared.prompts.get(prompt)
        assert got["prompt_embeds"].shape == (24, T5_WIDTH)
        assert got["pooled_prompt_embeds"].shape == (CLIP_WIDTH,)
        assert torch.equal(got["prompt_embeds"], expected["prompt_embeds"].to(torch.bfloat16))
        assert torch.equal(
            got["pooled_prompt_embeds"], expected["pooled_prompt_embeds"].to(torch.bfloat16)
        )
        assert torch.equal(got["attention_mask"], expected["attention_mask"])
    with pytest.raises(ValueError, match="'never seen' are not in the cache"):
        prepared.prompts.get("never seen")


class TestRecomputation:
    def start(self, tmp_path, settings, encoders, **options):
        encoders.reset()
        return prepare(config(tmp_path, **options), settings)

    def test_a_second_start_computes_and_loads_nothing(self, tmp_path, folder, settings, encoders):
        first = self.start(tmp_path, settings, encoders)
        assert encoders == (
            ["text", "vae"],
            ["tall 0", "tall 1", "wide 0", "wide 1", "wide 2", "wide 3", ""],
            6,
        )
        again = self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING
        assert again.datasets[0].samples == first.datasets[0].samples

    def test_images_are_not_read_by_a_second_start(self, tmp_path, folder, settings, monkeypatch):
        prepare(config(tmp_path), settings)
        monkeypatch.setattr(
            "fluxfast.data.scan.image_size", lambda path: pytest.fail(f"{path} is read")
        )
        monkeypatch.setattr(
            "fluxfast.data.scan.file_hash", lambda path: pytest.fail(f"{path} is read")
        )
        prepare(config(tmp_path), settings)

    def test_a_touched_image_is_not_recomputed_and_a_changed_one_alone_is(
        self, tmp_path, folder, settings, encoders
    ):
        self.start(tmp_path, settings, encoders)
        os.utime(folder / "wide_1.png", (time.time() + 5,) * 2)
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING
        photo(200, 100, 99).save(folder / "wide_1.png")
        changed = self.start(tmp_path, settings, encoders)
        assert encoders == (["vae"], [], 1)
        assert changed.report.datasets[0].encoded == 1

    def test_a_new_image_and_a_changed_caption(self, tmp_path, folder, settings, encoders):
        self.start(tmp_path, settings, encoders)
        photo(200, 100, 5).save(folder / "new.png")
        self.start(tmp_path, settings, encoders)
        assert encoders == (["text", "vae"], ["new"], 1)
        (folder / "wide_0.png").rename(folder / "renamed.png")
        self.start(tmp_path, settings, encoders)
        # a caption is the file's name, and latents are known by the content
        assert encoders == (["text"], ["renamed"], 0)

    def test_a_changed_setting_recomputes_only_what_it_changes(
        self, tmp_path, folder, settings, encoders
    ):
        self.start(tmp_path, settings, encoders)
        # six images have one prompt now, and their latents don't depend on it
        self.start(
            tmp_path, settings, encoders, caption_strategy="instanceprompt", instance_prompt="sks"
        )
        assert encoders == (["text"], ["sks"], 0)
        self.start(tmp_path, settings, encoders, resolution=64)
        assert encoders == (["vae"], [], 6)
        # changed back: the old entries are still there
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING
        # sampling has nothing to do with caches
        self.start(tmp_path, settings, encoders, repeats=3, probability=0.5)
        assert encoders == NOTHING

    @pytest.mark.parametrize(
        ("change", "texts", "images"),
        [
            ({"max_length": 32}, 7, 0),
            ({"t5_padding": "zero"}, 7, 0),
            ({"vae_tiling": True}, 0, 6),
            ({"vae_slicing": True}, 0, 0),
        ],
    )
    def test_encoder_settings(self, tmp_path, folder, settings, encoders, change, texts, images):
        self.start(tmp_path, settings, encoders)
        self.start(tmp_path, replace(settings, **change), encoders)
        assert (len(encoders.texts), encoders.images) == (texts, images)

    def test_other_weights(self, tmp_path, folder, settings, encoders):
        self.start(tmp_path, settings, encoders)
        other = str(make_pipeline(tmp_path / "other", seed=1))
        self.start(tmp_path, replace(settings, vae=(other, "vae", None)), encoders)
        assert encoders == (["vae"], [], 6)
        self.start(tmp_path, replace(settings, t5=(other, "text_encoder_2", None)), encoders)
        assert (encoders.loaded, len(encoders.texts)) == (["text"], 7)

    def test_damaged_cache_files_alone_are_recomputed(
        self, tmp_path, folder, settings, encoders, caplog
    ):
        self.start(tmp_path, settings, encoders)
        latents = sorted((tmp_path / "cache" / "vae0").glob("*.safetensors"))
        texts = sorted((tmp_path / "cache" / "text").glob("*.safetensors"))
        kept = load(latents[0].read_bytes())["latents"]
        latents[0].write_bytes(latents[0].read_bytes()[:-10])
        latents[1].unlink()
        texts[0].write_bytes(b"")
        self.start(tmp_path, settings, encoders)
        assert (encoders.loaded, len(encoders.texts), encoders.images) == (["text", "vae"], 1, 2)
        # the same bits, noise included
        assert torch.equal(load(latents[0].read_bytes())["latents"], kept)
        for damaged in (latents[0], latents[1], texts[0]):
            assert str(damaged) in caplog.text

    def test_what_a_failing_disk_changes_is_computed_anew(
        self, tmp_path, folder, settings, encoders
    ):
        first = self.start(tmp_path, settings, encoders)
        whole = {path: path.read_bytes() for path in (tmp_path / "cache").glob("*/*.safetensors")}
        for number, (path, data) in enumerate(whole.items()):
            # eight bytes, while the index is made to believe that nothing changed
            middle = len(data) // 2 + number
            path.write_bytes(
                data[:middle]
                + bytes(byte ^ 1 for byte in data[middle : middle + 8])
                + data[middle + 8 :]
            )
            index = Index(path.with_name("index.sqlite"))
            index.put_entries([(path.name, stamp(path.stat()))])
            index.close()
        again = self.start(tmp_path, settings, encoders)
        assert (len(encoders.texts), encoders.images) == (7, 6)
        for path, data in whole.items():
            before, now = load(data), load(path.read_bytes())
            assert before.keys() == now.keys()
            assert all(torch.equal(before[name], now[name]) for name in before)
        assert again.datasets[0].samples == first.datasets[0].samples

    def test_an_image_replaced_by_one_of_equal_size_and_time(
        self, tmp_path, folder, settings, encoders
    ):
        # without compression, so that all have the same size
        for number, name in enumerate(("a", "b")):
            photo(200, 100, 30 + number).save(folder / f"{name}.bmp")
        self.start(tmp_path, settings, encoders)
        stat = (folder / "a.bmp").stat()
        os.utime(folder / "b.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (folder / "b.bmp").replace(folder / "a.bmp")
        self.start(tmp_path, settings, encoders)
        assert encoders.images == 1

    def test_a_lost_index_recomputes_nothing(self, tmp_path, folder, settings, encoders):
        self.start(tmp_path, settings, encoders)
        for index in (tmp_path / "cache").glob("*/index.sqlite"):
            index.write_bytes(b"not a database, surely")
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING

    def test_killed_in_between_it_goes_on_where_it_was(
        self, tmp_path, folder, settings, encoders, monkeypatch
    ):
        put = TensorCache.put_many
        writes = []

        def interrupted(cache, entries):
            put(cache, entries)
            writes.append(cache)
            if len(writes) == 9:
                raise KeyboardInterrupt

        monkeypatch.setattr(TensorCache, "put_many", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path), settings)
        # seven captions one by one, then batches of four images: two portraits make the first, the
        # landscapes the second
        assert encoders.images == 6
        (tmp_path / "cache" / "vae0" / "index.sqlite").unlink()
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING

    def test_datasets_can_share_folders_and_caches(self, tmp_path, folder, settings, encoders):
        shared = {"cache_dir_vae": tmp_path / "cache" / "shared"}
        datasets = (
            {"id": "large", **shared},
            {"id": "small", "resolution": 64, **shared},
            {"id": "same", **shared},
        )
        encoders.reset()
        prepared = prepare(config(tmp_path, *datasets), settings)
        assert encoders.loaded == ["text", "vae"]
        # random crops are seeded by the dataset's id, so "same" shares only what is cropped alike
        assert 12 < encoders.images <= 18
        assert [len(dataset.samples) for dataset in prepared.datasets] == [6, 6, 6]
        encoders.reset()
        prepare(config(tmp_path, *datasets), settings)
        assert encoders == NOTHING


def test_encoders_are_loaded_in_turn_and_freed(tmp_path, folder, settings, monkeypatch):
    monkeypatch.undo()
    alive: dict[str, weakref.ref] = {}
    load_text, load_vae = TextEncoders.from_pretrained, LatentEncoder.from_pretrained

    def text(*args, **options):
        loaded = load_text(*args, **options)
        alive.update(clip=weakref.ref(loaded.text_encoder), t5=weakref.ref(loaded.text_encoder_2))
        return loaded

    def vae(*args, **options):
        assert [name for name, model in alive.items() if model() is not None] == []
        loaded = load_vae(*args, **options)
        alive.update(vae=weakref.ref(loaded.vae))
        return loaded

    monkeypatch.setattr(TextEncoders, "from_pretrained", text)
    monkeypatch.setattr(LatentEncoder, "from_pretrained", vae)
    prepared = prepare(config(tmp_path), settings)
    assert {name: model() for name, model in alive.items()} == {
        "clip": None,
        "t5": None,
        "vae": None,
    }
    assert prepared.datasets


def test_a_missing_model_is_named_before_anything_is_encoded(tmp_path, folder, pipeline_folder):
    shutil.copytree(
        pipeline_folder, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder_2")
    )
    with pytest.raises(ValueError, match=r"model: holds no folder 'text_encoder_2'"):
        prepare(config(tmp_path), EncoderSettings(pipeline=(str(tmp_path / "model"), None, None)))


def test_progress_bars_count_to_their_end(tmp_path, folder, settings):
    progress = Progress(disable=True)
    prepare(config(tmp_path), settings, progress=progress)
    assert {task.description: (task.completed, task.total) for task in progress.tasks} == {
        "scanning set0": (6, 6),
        "encoding captions": (7, 7),
        "encoding images of set0": (6, 6),
    }


def test_batches_are_of_one_size_and_at_most_vae_batch_size(
    tmp_path, folder, pipeline_folder, monkeypatch
):
    shapes = []
    encode_images = LatentEncoder.encode

    def watched(encoder, images, seeds):
        shapes.append(tuple(images.shape))
        return encode_images(encoder, images, seeds)

    monkeypatch.setattr(encode.LatentEncoder, "encode", watched)
    settings = EncoderSettings(
        pipeline=(str(pipeline_folder), None, None), max_length=8, vae_batch_size=3
    )
    prepare(config(tmp_path), settings)
    assert sorted(shapes) == [(1, 3, 64, 192), (2, 3, 192, 64), (3, 3, 64, 192)]


def test_a_dataset_may_have_its_own_vae_batch(tmp_path, folder, settings, monkeypatch):
    sizes, encode_images = [], LatentEncoder.encode

    def watched(encoder, images, seeds):
        sizes.append(len(images))
        return encode_images(encoder, images, seeds)

    monkeypatch.setattr(LatentEncoder, "encode", watched)
    prepare(config(tmp_path, {"vae_batch_size": 3}, {}), settings)
    assert sizes == [2, 3, 1, 2, 4]
