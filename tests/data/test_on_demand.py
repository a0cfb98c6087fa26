"""Images that are encoded while a run trains: which, when, to what bits, and what is kept."""

import json
import random

import pytest
import torch
from data_fixtures import photo
from prepare_cases import NOTHING, config, rendered

from fluxfast.data.batches import BatchLoader, caption_rng, load_batch
from fluxfast.data.buckets import apply, crop_rng, plan_crop
from fluxfast.data.encoders import LatentEncoder
from fluxfast.data.images import load_image, to_tensor
from fluxfast.data.prepare import prepare
from fluxfast.data.prepared import NotEncoded
from fluxfast.data.sampler import Sampler, SampleRef

# 128x128 out of 256x128
SQUARE = {"crop": True, "crop_style": "random", "vae_cache_clear_each_epoch": True}
SHAPES = SQUARE | {"crop_aspect": "random", "crop_aspect_buckets": [1.0, 0.5, 2.0]}


def files_of(prepared):
    return sorted(path.name for path in prepared.datasets[0].cache.folder.glob("*.safetensors"))


def test_images_are_encoded_once_when_they_are_needed(tmp_path, folder, settings, encoders):
    before = prepare(config(tmp_path, cache_dir_vae=tmp_path / "before"), settings)
    encoders.reset()
    prepared = prepare(config(tmp_path, vae_cache_ondemand=True), settings)
    assert encoders == NOTHING
    assert "set0: images are encoded when batches need them, and cached then" in rendered(
        prepared.report
    )
    (dataset,) = prepared.datasets
    assert dataset.samples == before.datasets[0].samples
    for sample in dataset.samples[:2]:
        for _ in range(2):
            assert torch.equal(dataset.latents(sample), before.datasets[0].latents(sample))
    assert encoders == (["vae"], [], 2)
    # what is there is there, with the key and without it
    again = prepare(config(tmp_path, vae_cache_ondemand=True), settings)
    again.datasets[0].latents(dataset.samples[0])
    assert encoders.images == 2
    prepare(config(tmp_path), settings)
    assert encoders.images == 6


def test_without_a_cache_each_batch_encodes(tmp_path, folder, settings, encoders):
    prepared = prepare(config(tmp_path, vae_cache_disable=True), settings)
    assert "batches need them, and not kept" in rendered(prepared.report)
    (dataset,) = prepared.datasets
    first, second = (dataset.latents(dataset.samples[3]) for _ in range(2))
    assert torch.equal(first, second)
    assert encoders.images == 2
    assert files_of(prepared) == []


def test_each_epoch_has_crops_of_its_own(tmp_path, folder, settings, pipeline_folder):
    (dataset,) = prepare(config(tmp_path, **SQUARE), settings, crop_seed=3).datasets
    vae = LatentEncoder.from_pretrained((str(pipeline_folder), "vae", None))
    for epoch in (1, 2, 3):
        for sample in dataset.samples_in(epoch)[1:3]:
            img = load_image(folder / sample.file)
            planned = plan_crop(
                img.size,
                resolution=128,
                crop=True,
                rng=crop_rng(3, dataset.id, sample.file, epoch),
            )
            pixels = to_tensor(apply(img, planned))[None]
            (expected,) = vae.encode(pixels, [int(sample.fingerprint[:15], 16)])
            assert torch.equal(dataset.latents(sample), expected)
    prints = [[s.fingerprint for s in dataset.samples_in(epoch)] for epoch in (1, 2, 3)]
    assert all(len(set(of_image)) == 3 for of_image in zip(*prints, strict=True))
    # the first epoch is that of a dataset without the key, whose latents stay
    plain = prepare(config(tmp_path, crop=True), settings, crop_seed=3).datasets[0]
    assert plain.samples == plain.samples_in(2)
    assert [s.fingerprint for s in plain.samples] == [s.fingerprint for s in dataset.samples]
    assert not {s.key for s in plain.samples} & {s.key for s in dataset.samples}


def test_latents_go_with_their_epoch(tmp_path, folder, settings, encoders, caplog):
    prepared = prepare(config(tmp_path, **SQUARE), settings)
    batches = loader(prepared, read_ahead=0)
    for _ in range(6):
        next(batches)
    first = files_of(prepared)
    assert len(first) == encoders.images == 6
    # another run keeps the same crops in the same folder, and this one has no say in that
    other = prepare(config(tmp_path, crop=True), settings)
    kept = set(files_of(other)) - set(first)
    assert len(kept) == 6
    next(batches)
    assert batches.epoch == 2
    (second,) = set(files_of(prepared)) - kept
    assert second not in first and kept < set(files_of(prepared))
    batches.close()
    # a later start doesn't miss what was dropped
    assert prepared.datasets[0].cache.missing([]) == []
    prepare(config(tmp_path, crop=True), settings)
    assert "gone" not in caplog.text
    assert len(files_of(prepared)) == 7


def test_shapes_that_change_with_the_epoch(tmp_path, folder, settings):
    prepared = prepare(config(tmp_path, **SHAPES, repeats=1), settings, train_batch_size=2)
    (dataset,) = prepared.datasets
    assert dataset.sizes == {(128, 128), (64, 192), (192, 64)}
    epochs = {tuple(sample.target for sample in dataset.samples_in(epoch)) for epoch in range(1, 9)}
    assert len(epochs) > 4
    sampler = Sampler(prepared.datasets, seed=5)
    drawn = {}
    for step in range(sampler.steps(8)):
        refs = sampler.next(step)
        samples = dataset.samples_in(sampler.epoch)
        assert len({samples[ref.index].target for ref in refs}) == 1
        assert {ref.epoch for ref in refs} == {sampler.epoch}
        drawn.setdefault(sampler.epoch, []).extend(ref.index for ref in refs)
    assert list(drawn) == list(range(1, 9))
    # each twice, and what fills up an odd batch
    assert all(min(map(drawn[epoch].count, range(6))) >= 2 for epoch in drawn)
    sampler.next(sampler.steps(8))
    assert sampler.epoch == 9


def loader(prepared, step=0, state=None, **options):
    sampler = Sampler(prepared.datasets, seed=5)
    if state is not None:
        assert sampler.load_state_dict(state) == []
    return BatchLoader(prepared, sampler, step=step, **options)


@pytest.mark.parametrize("stop", [5, 6, 20])
@pytest.mark.parametrize("keys", [SQUARE, SHAPES, SHAPES | {"vae_cache_disable": True}])
def test_a_resumed_run_reads_the_same_bits(tmp_path, folder, settings, keys, stop):
    def start():
        return prepare(config(tmp_path, **keys), settings)

    batches = loader(start())
    whole = [next(batches) for _ in range(24)]
    batches.close()
    first = loader(start())
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    prepared = start()
    # a part of what was cached is lost as well
    for name in random.Random(stop).sample(files_of(prepared), len(files_of(prepared)) // 2):
        (prepared.datasets[0].cache.folder / name).unlink()
    second = loader(prepared, stop, state)
    for expected in whole[stop:]:
        batch = next(second)
        assert (batch.files, batch.captions) == (expected.files, expected.captions)
        assert torch.equal(batch.latents, expected.latents)
    second.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "changed since the start"),
        (lambda path: photo(200, 100, 77).save(path), "changed since the start"),
    ],
)
def test_an_image_that_is_no_more_what_it_was(tmp_path, folder, settings, damage, reason):
    prepared = prepare(config(tmp_path, vae_cache_ondemand=True), settings)
    (dataset,) = prepared.datasets
    damage(folder / "wide_1.png")
    told = []
    batch = load_batch(
        prepared,
        [SampleRef("set0", 3)],
        rng=caption_rng(0, 0),
        on_lost=lambda lost, instead: told.append((lost, instead.file)),
    )
    assert batch.files == ["wide_2.png"]
    ((lost, instead),) = told
    assert instead == "wide_2.png"
    assert lost.told == (f"the latents of wide_1.png (dataset 'set0') can't be computed: {reason}")
    for name in ("wide_0", "wide_2", "wide_3"):
        (folder / f"{name}.png").unlink()
    for path in dataset.cache.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(NotEncoded, match=r"wide_1.png .*; replace or remove the file"):
        load_batch(prepared, [SampleRef("set0", 3)], rng=caption_rng(0, 0))


def test_latents_that_are_no_numbers(tmp_path, folder, settings, monkeypatch):
    (dataset,) = prepare(config(tmp_path, vae_cache_ondemand=True), settings).datasets
    nan = torch.full((1, 16, 8, 24), torch.nan)
    monkeypatch.setattr(LatentEncoder, "encode", lambda self, images, seeds: nan)
    with pytest.raises(NotEncoded, match=r"wide_0.png .*: the VAE gives NaN or infinity for it"):
        dataset.latents(dataset.samples[2])
