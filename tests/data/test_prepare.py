import os
import re
import shutil
import time
import weakref
from dataclasses import replace

import pytest
import torch
from data_fixtures import CLIP_WIDTH, T5_WIDTH, make_pipeline, photo
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load

import fluxfast.data.encode as encode
from fluxfast.data.buckets import apply, crop_rng, plan
from fluxfast.data.cache import TensorCache
from fluxfast.data.config import DataConfig, ImageDataset, TextEmbeds
from fluxfast.data.encode import EncoderSettings
from fluxfast.data.encoders import LatentEncoder, TextEncoders
from fluxfast.data.images import load_image, to_tensor
from fluxfast.data.prepare import prepare


class Encoders:
    """Counts what the encoders are asked for."""

    def __init__(self, monkeypatch):
        self.loaded, self.texts, self.images = [], [], 0
        for kind, name in ((TextEncoders, "text"), (LatentEncoder, "vae")):
            self._watch_loading(monkeypatch, kind, name)
        texts, images = TextEncoders.encode, LatentEncoder.encode

        def encode_texts(encoders, captions):
            self.texts += captions
            return texts(encoders, captions)

        def encode_images(encoder, batch, seeds):
            self.images += len(batch)
            return images(encoder, batch, seeds)

        monkeypatch.setattr(TextEncoders, "encode", encode_texts)
        monkeypatch.setattr(LatentEncoder, "encode", encode_images)

    def _watch_loading(self, monkeypatch, kind, name):
        load = kind.from_pretrained

        def from_pretrained(*args, **options):
            self.loaded.append(name)
            return load(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    def reset(self):
        self.loaded, self.texts, self.images = [], [], 0

    def __eq__(self, other):
        return (self.loaded, self.texts, self.images) == other


NOTHING = ([], [], 0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # encoders as small as these only lose time to further threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    # takes longer than these encoders do
    monkeypatch.setattr(encode.gc, "collect", lambda: 0)


@pytest.fixture
def encoders(monkeypatch):
    return Encoders(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """Six images: four landscape, two portrait."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for i in range(4):
        photo(200, 100, i).save(root / f"wide_{i}.png")
    for i in range(2):
        photo(100, 200, 10 + i).save(root / "sub" / f"tall_{i}.png")
    return root


@pytest.fixture
def settings(pipeline_folder):
    return EncoderSettings(pipeline=(str(pipeline_folder), None, None), max_length=24)


def config(tmp_path, *datasets, **options):
    """A data config of one dataset with `options`, or of several `datasets`."""
    images = [
        ImageDataset(
            **{
                "id": f"set{i}",
                "instance_data_dir": tmp_path / "images",
                "cache_dir_vae": tmp_path / "cache" / f"vae{i}",
                "resolution": 128,
                "resolution_type": "pixel_area",
                "caption_strategy": "filename",
            }
            | one
        )
        for i, one in enumerate(datasets or [options])
    ]
    return DataConfig(
        images=tuple(images),
        text_embeds=TextEmbeds(id="text", dataset_type="text_embeds", cache_dir=tmp_path / "cache" / "text"),
    )


def rendered(report):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(report)
    return console.export_text()


def test_everything_is_cached_as_the_encoders_give_it(tmp_path, folder, settings, pipeline_folder):
    prepared = prepare(config(tmp_path), settings, extra_prompts=["a validation prompt"])
    (dataset,) = prepared.datasets
    files = ["sub/tall_0.png", "sub/tall_1.png", "wide_0.png", "wide_1.png", "wide_2.png", "wide_3.png"]
    assert [sample.file for sample in dataset.samples] == files
    vae = LatentEncoder.from_pretrained((str(pipeline_folder), "vae", None))
    for sample in dataset.samples:
        assert sample.target == ((64, 192) if "tall" in sample.file else (192, 64))
        img = load_image(folder / sample.file)
        planned = plan(img.size, resolution=128, rng=crop_rng(0, dataset.id, sample.file))
        expected = vae.encode(to_tensor(apply(img, planned))[None], [int(sample.fingerprint[:15], 16)])[0]
        assert torch.equal(dataset.latents(sample), expected)
    text = TextEncoders.from_pretrained(settings.pipeline, max_length=24)
    for prompt in ["wide 0", "tall 1", "", "a validation prompt"]:
        expected = {name: value[0] for name, value in text.encode([prompt]).items()}
        got = prepared.prompts.get(prompt)
        assert got["prompt_embeds"].shape == (24, T5_WIDTH)
        assert got["pooled_prompt_embeds"].shape == (CLIP_WIDTH,)
        assert torch.equal(got["prompt_embeds"], expected["prompt_embeds"].to(torch.bfloat16))
        assert torch.equal(got["pooled_prompt_embeds"], expected["pooled_prompt_embeds"].to(torch.bfloat16))
        assert torch.equal(got["attention_mask"], expected["attention_mask"])
    with pytest.raises(ValueError, match="'never seen' are not in the cache"):
        prepared.prompts.get("never seen")


class TestRecomputation:
    def start(self, tmp_path, settings, encoders, **options):
        encoders.reset()
        return prepare(config(tmp_path, **options), settings)

    def test_a_second_start_computes_and_loads_nothing(self, tmp_path, folder, settings, encoders):
        first = self.start(tmp_path, settings, encoders)
        assert encoders == (["text", "vae"], ["tall 0", "tall 1", "wide 0", "wide 1", "wide 2", "wide 3", ""], 6)
        again = self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING
        assert again.datasets[0].samples == first.datasets[0].samples

    def test_images_are_not_read_by_a_second_start(self, tmp_path, folder, settings, monkeypatch):
        prepare(config(tmp_path), settings)
        monkeypatch.setattr("fluxfast.data.scan.image_size", lambda path: pytest.fail(f"{path} is read"))
        monkeypatch.setattr("fluxfast.data.scan.file_hash", lambda path: pytest.fail(f"{path} is read"))
        prepare(config(tmp_path), settings)

    def test_a_touched_image_is_not_recomputed_and_a_changed_one_alone_is(self, tmp_path, folder, settings, encoders):
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
        assert encoders == (["text", "vae"], ["renamed"], 1)

    def test_a_changed_setting_recomputes_only_what_it_changes(self, tmp_path, folder, settings, encoders):
        self.start(tmp_path, settings, encoders)
        # six images have one prompt now, and their latents don't depend on it
        self.start(tmp_path, settings, encoders, caption_strategy="instanceprompt", instance_prompt="sks")
        assert encoders == (["text"], ["sks"], 0)
        self.start(tmp_path, settings, encoders, resolution=64)
        assert encoders == (["vae"], [], 6)
        # back again: still there
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

    def test_damaged_cache_files_alone_are_recomputed(self, tmp_path, folder, settings, encoders, caplog):
        self.start(tmp_path, settings, encoders)
        latents = sorted((tmp_path / "cache" / "vae0").glob("*.safetensors"))
        texts = sorted((tmp_path / "cache" / "text").glob("*.safetensors"))
        kept = load(latents[0].read_bytes())["latents"]
        latents[0].write_bytes(latents[0].read_bytes()[:-10])
        latents[1].unlink()
        texts[0].write_bytes(b"")
        self.start(tmp_path, settings, encoders)
        assert (encoders.loaded, len(encoders.texts), encoders.images) == (["text", "vae"], 1, 2)
        # to the bit, noise included
        assert torch.equal(load(latents[0].read_bytes())["latents"], kept)
        for damaged in (latents[0], latents[1], texts[0]):
            assert str(damaged) in caplog.text

    def test_a_lost_index_recomputes_nothing(self, tmp_path, folder, settings, encoders):
        self.start(tmp_path, settings, encoders)
        for index in (tmp_path / "cache").glob("*/index.sqlite"):
            index.write_bytes(b"not a database, surely")
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING

    def test_killed_in_between_it_goes_on_where_it_was(self, tmp_path, folder, settings, encoders, monkeypatch):
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
        # seven captions one by one, then batches of four images: two portraits make the first, the landscapes the second
        assert encoders.images == 6
        (tmp_path / "cache" / "vae0" / "index.sqlite").unlink()
        self.start(tmp_path, settings, encoders)
        assert encoders == NOTHING

    def test_datasets_can_share_folders_and_caches(self, tmp_path, folder, settings, encoders):
        shared = {"cache_dir_vae": tmp_path / "cache" / "shared"}
        datasets = ({"id": "large", **shared}, {"id": "small", "resolution": 64, **shared}, {"id": "same", **shared})
        encoders.reset()
        prepared = prepare(config(tmp_path, *datasets), settings)
        assert encoders.loaded == ["text", "vae"]
        # random crops are seeded by the dataset's id, so "same" has crops of its own
        assert encoders.images == 18
        assert [len(dataset.samples) for dataset in prepared.datasets] == [6, 6, 6]
        encoders.reset()
        prepare(config(tmp_path, *datasets), settings)
        assert encoders == NOTHING


class TestLeftOut:
    def test_unreadable_images_are_named_and_counted(self, tmp_path, folder, settings, encoders):
        (folder / "broken [1].png").write_bytes((folder / "wide_0.png").read_bytes()[:-200])
        (folder / "text.jpg").write_text("no image")
        (folder / "empty.webp").touch()
        (folder / "gone.png").symlink_to(folder / "nowhere.png")
        for _ in range(2):
            encoders.reset()
            prepared = prepare(config(tmp_path), settings)
            assert len(prepared.datasets[0].samples) == 6
            text = rendered(prepared.report)
            assert "4 unreadable" in text
            for line in (
                "broken [1].png: unreadable (",
                "text.jpg: unreadable (not an image",
                "empty.webp: unreadable (empty file)",
                "gone.png: unreadable (the link points nowhere)",
            ):
                assert line in text
        # the second start has nothing to encode but what can't be read, and needs no encoder to find that out
        assert encoders == NOTHING

    def test_an_image_whose_damage_shows_only_when_decoded(self, tmp_path, folder, settings, encoders):
        photo(200, 100, 3).save(folder / "late.jpg", quality=95)
        data = (folder / "late.jpg").read_bytes()
        (folder / "late.jpg").write_bytes(data[: len(data) * 2 // 3])
        prepared = prepare(config(tmp_path), settings)
        assert "late.jpg: unreadable (truncated)" in rendered(prepared.report)
        assert len(prepared.datasets[0].samples) == 6
        encoders.reset()
        prepare(config(tmp_path), settings)
        assert encoders == NOTHING

    def test_a_vae_that_gives_nan(self, tmp_path, folder, settings, monkeypatch):
        encode_images = LatentEncoder.encode

        def sometimes(encoder, images, seeds):
            latents = encode_images(encoder, images, seeds)
            latents[0, 0, 0, 0] = float("nan")
            return latents

        monkeypatch.setattr(LatentEncoder, "encode", sometimes)
        prepared = prepare(config(tmp_path), settings, disable_bucket_pruning=True)
        text = rendered(prepared.report)
        assert "2 the VAE gives NaN or infinity for it" in text
        assert len(prepared.datasets[0].samples) == 4

    def test_filters_and_captions(self, tmp_path, folder, settings):
        photo(60, 60).save(folder / "tiny.png")
        photo(900, 100).save(folder / "panorama.png")
        photo(100, 900).save(folder / "tower.png")
        for i in range(3):
            (folder / f"wide_{i}.txt").write_text(f"first caption {i}\nsecond caption {i}\n")
        (folder / "wide_3.txt").write_text("\n")
        for name in ("tiny", "panorama", "tower"):
            (folder / f"{name}.txt").write_text("caption")
        data = config(
            tmp_path, caption_strategy="textfile", minimum_image_size=100, minimum_aspect_ratio=0.4, maximum_aspect_ratio=4
        )
        prepared = prepare(data, settings, disable_bucket_pruning=True)
        assert [sample.file for sample in prepared.datasets[0].samples] == ["wide_0.png", "wide_1.png", "wide_2.png"]
        assert prepared.datasets[0].samples[1].captions == ("first caption 1", "second caption 1")
        text = rendered(prepared.report)
        for line in (
            "2 no caption file beside it",
            "1 its caption file is empty",
            "tiny.png: smaller than minimum_image_size 100 (60x60)",
            "panorama.png: wider than maximum_aspect_ratio 4 (900x100)",
            "tower.png: narrower than minimum_aspect_ratio 0.4 (100x900)",
            "7 texts (captions, the empty one, validation's), 7 newly encoded",
        ):
            assert line in text, line

    def test_caches_and_outputs_inside_the_images_folder(self, tmp_path, folder, settings):
        (folder / "output").mkdir()
        photo(64, 64).save(folder / "output" / "validation.png")
        (folder / "vae").mkdir()
        photo(64, 64).save(folder / "vae" / "no_image.png")
        prepared = prepare(config(tmp_path, cache_dir_vae=folder / "vae"), settings, skip_folders=[folder / "output"])
        assert prepared.report.datasets[0].found == 6

    def test_max_num_samples_is_a_fixed_choice_by_id(self, tmp_path, folder, settings):
        def chosen(**options):
            prepared = prepare(config(tmp_path, max_num_samples=3, **options), settings, disable_bucket_pruning=True)
            return [sample.file for sample in prepared.datasets[0].samples]

        assert len(chosen()) == 3
        assert chosen() == chosen()
        assert len({tuple(chosen(id=f"id{i}")) for i in range(4)}) > 1

    def test_long_lists_are_cut(self, tmp_path, folder, settings):
        for i in range(30):
            (folder / f"bad{i:02}.png").touch()
        text = rendered(prepare(config(tmp_path), settings).report)
        assert "30 unreadable" in text
        assert text.count("empty file") == 20
        assert "… and 10 more" in text


class TestUnusable:
    def error(self, tmp_path, settings, *datasets, **options):
        with pytest.raises(ValueError, match="no images detected in dataset") as caught:
            prepare(config(tmp_path, *datasets), settings, **options)
        return str(caught.value)

    def test_no_image_files(self, tmp_path, settings, encoders):
        (tmp_path / "images").mkdir()
        assert "it is empty" in self.error(tmp_path, settings)
        (tmp_path / "images" / "a.heic").touch()
        (tmp_path / "images" / "b.heic").touch()
        message = self.error(tmp_path, settings)
        assert 'dataset "set0"' in message
        assert "it holds only 2 .heic" in message
        assert "jpg" in message
        assert encoders == NOTHING

    def test_a_missing_folder(self, tmp_path, settings):
        with pytest.raises(ValueError, match=r"images: no such folder; instance_data_dir"):
            prepare(config(tmp_path), settings)

    def test_none_usable_says_why_and_what_to_do(self, tmp_path, folder, settings, encoders):
        (folder / "bad.png").touch()
        message = self.error(tmp_path, settings, {"minimum_image_size": 512})
        assert "7 found in" in message
        assert re.search(r"6x smaller than minimum_image_size 512 \(such as sub/tall_0.png: 100x200\); lower", message)
        assert "1x unreadable (such as bad.png: empty file); replace or remove" in message
        message = self.error(tmp_path, settings, {"caption_strategy": "textfile"})
        assert "6x no caption file beside it" in message
        assert '"caption_strategy"' in message
        assert encoders == NOTHING

    def test_too_few_tells_the_repeats_that_would_do(self, tmp_path, folder, settings, encoders):
        options = {"train_batch_size": 4, "gradient_accumulation_steps": 5}
        message = self.error(tmp_path, settings, {"repeats": 1}, **options)
        assert "6 usable images * (1 + 1 repeats) = 12 samples are too few" in message
        assert "train_batch_size 4 * gradient_accumulation_steps 5 = 20" in message
        assert 'Set "repeats": 3 (gives 24)' in message
        assert encoders == NOTHING
        # what it says will do does, and one less doesn't
        assert prepare(config(tmp_path, repeats=3), settings, **options).datasets[0].repeats == 3
        assert '"repeats": 3' in self.error(tmp_path, settings, {"repeats": 2}, **options)

    def test_more_than_vae_batch_size(self, tmp_path, folder, settings):
        for name in ("wide_0", "wide_1"):
            (folder / f"{name}.png").unlink()
        message = self.error(tmp_path, settings)
        assert "4 usable images * (1 + 0 repeats) = 4 samples" in message
        assert "more than vae_batch_size 4" in message
        assert 'Set "repeats": 1 (gives 8)' in message

    def test_all_bad_datasets_are_named_together(self, tmp_path, folder, settings):
        message = self.error(tmp_path, settings, {"minimum_image_size": 512}, {}, {"id": "third", "train_batch_size": 9})
        assert '"set0"' in message
        assert '"set1"' not in message
        assert 'dataset "third"' in message
        assert "train_batch_size 9" in message

    def test_relaxed(self, tmp_path, folder, settings):
        options = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
        prepared = prepare(config(tmp_path), settings, disable_bucket_pruning=True, **options)
        assert prepared.datasets[0].repeats == 0
        assert "batches of 64x192 are filled up with repeats" in rendered(prepared.report)
        prepared = prepare(config(tmp_path), settings, allow_dataset_oversubscription=True, **options)
        # two portraits: 2 * (1 + 3) = 8 fill a step
        assert prepared.datasets[0].repeats == 3
        text = rendered(prepared.report)
        assert "repeats raised from 0 to 3" in text
        assert prepared.report.datasets[0].samples_per_epoch == 24

    def test_images_lost_while_encoding_count(self, tmp_path, folder, settings):
        for path in folder.glob("*.png"):
            path.unlink()
        for path in (folder / "sub").glob("*.png"):
            img = load_image(path)
            path.unlink()
            img.save(path.with_suffix(".jpg"), quality=95)
            data = path.with_suffix(".jpg").read_bytes()
            path.with_suffix(".jpg").write_bytes(data[: len(data) // 2])
        message = self.error(tmp_path, settings, disable_bucket_pruning=True)
        assert "2x unreadable (such as sub/tall_0.jpg: truncated)" in message


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
    assert {name: model() for name, model in alive.items()} == {"clip": None, "t5": None, "vae": None}
    assert prepared.datasets


def test_a_missing_model_is_named_before_anything_is_encoded(tmp_path, folder, pipeline_folder):
    shutil.copytree(pipeline_folder, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder_2"))
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


def test_batches_are_of_one_size_and_at_most_vae_batch_size(tmp_path, folder, pipeline_folder, monkeypatch):
    shapes = []
    encode_images = LatentEncoder.encode

    def watched(encoder, images, seeds):
        shapes.append(tuple(images.shape))
        return encode_images(encoder, images, seeds)

    monkeypatch.setattr(encode.LatentEncoder, "encode", watched)
    settings = EncoderSettings(pipeline=(str(pipeline_folder), None, None), max_length=8, vae_batch_size=3)
    prepare(config(tmp_path), settings)
    assert sorted(shapes) == [(1, 3, 64, 192), (2, 3, 192, 64), (3, 3, 64, 192)]
