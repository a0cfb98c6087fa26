"""What `prepare` leaves out and says so, and what it stops at."""

import json
import os
import re

import pytest
from data_fixtures import photo
from prepare_cases import NOTHING, config, rendered

from fluxfast.data.encoders import LatentEncoder
from fluxfast.data.images import load_image
from fluxfast.data.prepare import prepare
from fluxfast.data.sampler import Sampler

# encoders as small as these only lose time to further threads, and to a collection
pytestmark = pytest.mark.usefixtures("one_thread", "no_collection")


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
        # the second start has nothing to encode but what can't be read, and needs no encoder to
        # find that out
        assert encoders == NOTHING

    def test_kinds_that_are_not_read_are_counted_and_named(self, tmp_path, folder, settings):
        for name in ("IMG_0001.DNG", "IMG_0002.dng", "old [b].psd", "sub/c.CR2", "notes.txt"):
            (folder / name).write_bytes(b"x")
        report = prepare(config(tmp_path), settings).report
        assert report.datasets[0].found == 6
        expected = (
            "set0: 4 files of kinds that are not read: .dng 2, .psd 1, .cr2 1 (such as "
            "IMG_0001.DNG, IMG_0002.dng, old [b].psd)"
        )
        assert f"{expected}; convert to PNG or JPEG" in rendered(report).replace("\n", "")

    def test_names_that_are_no_text(self, tmp_path, folder, settings, encoders):
        odd = [
            os.fsdecode(name)
            for name in (
                b"M\xfcnchen",
                "写真".encode("gbk"),
                b"new\nline",
                b"M\\xfcnchen",
                b"[bold]",
            )
        ]
        for number, name in enumerate(odd):
            photo(200, 100, 20 + number).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text("a photo")
            (folder / f"bad {name}.jpg").touch()
        os.rename(folder / "sub", folder / os.fsdecode(b"sess\xe3o"))  # noqa: PTH104
        for path in folder.rglob("*.png"):
            path.with_suffix(".txt").write_text("a photo")
        for _ in range(2):
            encoders.reset()
            prepared = prepare(config(tmp_path, caption_strategy="textfile", id="[/odd]"), settings)
            (dataset,) = prepared.datasets
            assert len(dataset.samples) == 11
            assert (
                len({dataset.latents(sample).float().sum().item() for sample in dataset.samples})
                == 11
            )
            text = rendered(prepared.report)
            assert text.encode()
            for name in (
                "bad M\\xfcnchen.jpg",
                "bad д\\xd5\\xe6.jpg",
                "bad new\\nline.jpg",
                "bad [bold].jpg",
            ):
                assert f"{name}: unreadable (empty file)" in text
        assert encoders == NOTHING
        # as captions, those that are no text are left out
        prepared = prepare(config(tmp_path, caption_strategy="filename"), settings)
        text = rendered(prepared.report)
        assert "2 its name, which is to be its caption, is not UTF-8" in text
        assert "M\\xfcnchen.png: its name" in text
        # a new order, or another seed, would draw other crops
        sampler = Sampler(prepared.datasets, seed=1)
        assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()

    def test_an_image_whose_damage_shows_only_when_decoded(
        self, tmp_path, folder, settings, encoders
    ):
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
            tmp_path,
            caption_strategy="textfile",
            minimum_image_size=100,
            minimum_aspect_ratio=0.4,
            maximum_aspect_ratio=4,
        )
        prepared = prepare(data, settings, disable_bucket_pruning=True)
        assert [sample.file for sample in prepared.datasets[0].samples] == [
            "wide_0.png",
            "wide_1.png",
            "wide_2.png",
        ]
        assert prepared.datasets[0].samples[1].captions == ("first caption 1", "second caption 1")
        text = rendered(prepared.report)
        for line in (
            "2 no caption file beside it",
            "1 its caption file is empty",
            "tiny.png: smaller than minimum_image_size 100 (60x60)",
            "panorama.png: wider than maximum_aspect_ratio 4 (900x100)",
            "tower.png: narrower than minimum_aspect_ratio 0.4 (100x900)",
            "newly encoded: 3 images, 7 texts",
        ):
            assert line in text, line

    @pytest.mark.parametrize("crop_aspect", ["random", "closest"])
    def test_max_upscale_threshold(self, tmp_path, folder, settings, crop_aspect):
        # 128x128 enlarges each image by 28 %, 192x64 a tall one by 92 % and a wide one not at all
        buckets = [{"aspect_bucket": 1.0, "weight": 1.0}, {"aspect_bucket": 2.0, "weight": 0.0}]
        options = {"crop": True, "crop_aspect": crop_aspect, "max_upscale_threshold": 0.2}
        data = config(tmp_path, crop_aspect_buckets=[1.0, 2.0], **options)
        prepared = prepare(data, settings, disable_bucket_pruning=True)
        samples = prepared.datasets[0].samples
        assert {sample.target for sample in samples} == {(192, 64)}
        assert len(samples) == 4
        assert "tall_0.png: upscaled by more than max_upscale_threshold 0.2 (100x200)" in rendered(
            prepared.report
        )
        data = config(tmp_path, crop_aspect_buckets=buckets, **options)
        # random never draws what has no weight, and closest doesn't look at weights
        if crop_aspect == "random":
            with pytest.raises(
                ValueError, match=r'6x upscaled by .*; raise "max_upscale_threshold"'
            ):
                prepare(data, settings, disable_bucket_pruning=True)
        else:
            prepared = prepare(data, settings, disable_bucket_pruning=True)
            assert prepared.datasets[0].samples == samples

    def test_caches_and_outputs_inside_the_images_folder(self, tmp_path, folder, settings):
        (folder / "output").mkdir()
        photo(64, 64).save(folder / "output" / "validation.png")
        (folder / "vae").mkdir()
        photo(64, 64).save(folder / "vae" / "no_image.png")
        prepared = prepare(
            config(tmp_path, cache_dir_vae=folder / "vae"),
            settings,
            skip_folders=[folder / "output"],
        )
        assert prepared.report.datasets[0].found == 6

    def test_max_num_samples_is_a_fixed_choice_by_id(self, tmp_path, folder, settings):
        def chosen(**options):
            prepared = prepare(
                config(tmp_path, max_num_samples=3, **options),
                settings,
                disable_bucket_pruning=True,
            )
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
        with pytest.raises(ValueError, match=r"no images detected|too few samples") as caught:
            prepare(config(tmp_path, *datasets), settings, **options)
        return str(caught.value)

    def test_no_image_files(self, tmp_path, settings, encoders):
        (tmp_path / "images").mkdir()
        assert "it is empty" in self.error(tmp_path, settings)
        (tmp_path / "images" / "a.dng").touch()
        (tmp_path / "images" / "b.dng").touch()
        message = self.error(tmp_path, settings)
        assert 'dataset "set0"' in message
        assert "it holds only 2 .dng" in message
        assert (
            "2 files of kinds that are not read: .dng 2 (such as a.dng, b.dng); convert to PNG "
            "or JPEG" in message
        )
        assert "jpg" in message
        assert encoders == NOTHING

    def test_a_missing_folder(self, tmp_path, settings):
        with pytest.raises(ValueError, match=r"images: no such folder; instance_data_dir"):
            prepare(config(tmp_path), settings)

    def test_none_usable_says_why_and_what_to_do(self, tmp_path, folder, settings, encoders):
        (folder / "bad.png").touch()
        message = self.error(tmp_path, settings, {"minimum_image_size": 512})
        assert "7 found in" in message
        assert re.search(
            r"6x smaller than minimum_image_size 512 \(such as sub/tall_0.png: 100x200\); lower",
            message,
        )
        assert "1x unreadable (such as bad.png: empty file); replace or remove" in message
        message = self.error(tmp_path, settings, {"caption_strategy": "textfile"})
        assert "6x no caption file beside it" in message
        assert '"caption_strategy"' in message
        assert encoders == NOTHING

    def test_too_few_tells_the_repeats_that_would_do(self, tmp_path, folder, settings, encoders):
        options = {"train_batch_size": 4, "gradient_accumulation_steps": 5}
        message = self.error(tmp_path, settings, {"repeats": 1}, **options)
        assert "too few samples for a step: 6 usable images * (1 + 1 repeats) = 12." in message
        assert "no images" not in message and "lower train_batch_size" in message
        assert "train_batch_size 4 * gradient_accumulation_steps 5 = 20" in message
        assert 'Set "repeats": 3 (gives 24)' in message
        assert encoders == NOTHING
        # the number that the message gives is enough, and one less is not
        assert prepare(config(tmp_path, repeats=3), settings, **options).datasets[0].repeats == 3
        assert '"repeats": 3' in self.error(tmp_path, settings, {"repeats": 2}, **options)

    def test_more_than_vae_batch_size(self, tmp_path, folder, settings):
        for name in ("wide_0", "wide_1"):
            (folder / f"{name}.png").unlink()
        message = self.error(tmp_path, settings)
        assert "4 usable images * (1 + 0 repeats) = 4." in message
        assert "more than vae_batch_size 4" in message
        assert 'Set "repeats": 1 (gives 8)' in message

    def test_all_bad_datasets_are_named_together(self, tmp_path, folder, settings):
        message = self.error(
            tmp_path,
            settings,
            {"minimum_image_size": 512},
            {},
            {"id": "third", "train_batch_size": 9},
        )
        assert '"set0"' in message
        assert '"set1"' not in message
        assert 'dataset "third"' in message
        assert "train_batch_size 9" in message

    def test_relaxed(self, tmp_path, folder, settings):
        options = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
        prepared = prepare(config(tmp_path), settings, disable_bucket_pruning=True, **options)
        assert prepared.datasets[0].repeats == 0
        assert "batches of 64x192 are filled up with repeats" in rendered(prepared.report)
        prepared = prepare(
            config(tmp_path), settings, allow_dataset_oversubscription=True, **options
        )
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
