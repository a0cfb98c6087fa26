"""Batches hold what the caches hold, are read ahead, and outlive lost cache files."""

import json
import threading
from collections import Counter
from concurrent.futures import wait
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fluxfast.data.batches import BatchLoader, caption_rng, load_batch
from fluxfast.data.cache import TensorCache
from fluxfast.data.dataset_report import DataReport
from fluxfast.data.prepared import LostEntry, Prepared, PreparedDataset, PromptCache, Sample
from fluxfast.data.sampler import Sampler, SampleRef

PROMPTS = ["", "one", "two", "three"]


def value(text):
    return float(sum(text.encode()))


@pytest.fixture
def prepared(tmp_path):
    texts, images = TensorCache(tmp_path / "text"), TensorCache(tmp_path / "vae")
    texts.put_many(
        (
            prompt,
            "t",
            {
                "prompt_embeds": torch.full((4, 8), value(prompt), dtype=torch.bfloat16),
                "pooled_prompt_embeds": torch.full((6,), value(prompt) + 1, dtype=torch.bfloat16),
                "attention_mask": torch.arange(4) < len(prompt),
            },
        )
        for prompt in PROMPTS
    )
    datasets = []
    for id, regularisation in (("a", False), ("b", True)):
        samples = []
        for i in range(6):
            width = 8 if i < 4 else 10
            images.put(
                f"{id}/{i}",
                "l",
                {"latents": torch.full((16, 6, width), float(i), dtype=torch.bfloat16)},
            )
            samples.append(
                Sample(
                    f"{i}.png",
                    ("one", "two", "three")[: 1 + i % 3],
                    (width * 8, 48),
                    f"{id}/{i}",
                    "l",
                )
            )
        datasets.append(
            PreparedDataset(
                id=id,
                samples=tuple(samples),
                cache=images,
                train_batch_size=2,
                repeats=1,
                is_regularisation_data=regularisation,
                timestep_sampling_offset=0.5 if regularisation else 0.0,
            )
        )
    return Prepared(tuple(datasets), PromptCache(texts, "t"), DataReport([], 0))


def test_a_batch_holds_what_the_caches_do(prepared):
    batch = load_batch(prepared, [SampleRef("b", 1), SampleRef("b", 2)], rng=caption_rng(0, 0))
    assert batch.latents.shape == (2, 16, 6, 8)
    assert batch.latents.dtype == batch.prompt_embeds.dtype == torch.bfloat16
    assert batch.latents[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.files == ["1.png", "2.png"]
    assert (batch.dataset, batch.is_regularisation_data, batch.timestep_sampling_offset) == (
        "b",
        True,
        0.5,
    )
    for i, caption in enumerate(batch.captions):
        assert caption in ("one", "two", "three")
        assert batch.prompt_embeds[i].unique().tolist() == [value(caption)]
        assert batch.pooled_prompt_embeds[i].unique().tolist() == [
            float(torch.tensor(value(caption) + 1).bfloat16())
        ]
        assert batch.attention_mask[i].sum() == min(4, len(caption))


def test_captions_are_picked_evenly_and_dropped_with_the_given_probability(prepared):
    counts = Counter()
    for step in range(600):
        batch = load_batch(
            prepared,
            [SampleRef("a", 2)],
            caption_dropout_probability=0.25,
            rng=caption_rng(1, step),
        )
        counts[batch.captions[0]] += 1
        expected = value(batch.captions[0])
        assert batch.prompt_embeds.unique().tolist() == [float(torch.tensor(expected).bfloat16())]
    # 150 each; five standard deviations are 53
    assert all(97 < counts[caption] < 203 for caption in PROMPTS)


def test_dropout_of_none_and_all(prepared):
    refs = [SampleRef("a", 0)] * 20
    assert set(load_batch(prepared, refs, rng=caption_rng(0, 0)).captions) == {"one"}
    assert set(
        load_batch(prepared, refs, caption_dropout_probability=1.0, rng=caption_rng(0, 0)).captions
    ) == {""}


def test_a_lost_cache_file_is_named(prepared):
    for path in prepared.datasets[0].cache.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"vae: the latents of 0.png \(dataset 'a'\) are not in the cache any more"
    ):
        load_batch(prepared, [SampleRef("a", 0)], rng=caption_rng(0, 0))


def blobs(prepared, id, *indices):
    (dataset,) = [dataset for dataset in prepared.datasets if dataset.id == id]
    return [dataset.cache._blob(dataset.samples[index].key, "l") for index in indices]


class TestLost:
    """A cache file that is lost or damaged after the start."""

    def test_the_next_whole_sample_of_the_bucket_takes_its_place(self, prepared):
        told = []
        gone, damaged = blobs(prepared, "a", 2, 3)
        gone.unlink()
        damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
        refs = [SampleRef("a", 1), SampleRef("a", 2)]
        batch = load_batch(
            prepared, refs, rng=caption_rng(0, 0), on_lost=lambda *lost: told.append(lost)
        )
        # 4 and 5 are of another size
        assert batch.files == ["1.png", "0.png"]
        assert batch.latents[:, 0, 0, 0].tolist() == [1, 0]
        assert batch.captions[1] == "one"
        ((lost, instead),) = told
        assert lost.what == "the latents of 2.png (dataset 'a')"
        assert instead is prepared.datasets[0].samples[0]

    def test_the_others_of_a_batch_are_what_they_would_have_been(self, prepared):
        refs = [SampleRef("a", index) for index in (2, 0, 2, 1)]
        whole = load_batch(prepared, refs, caption_dropout_probability=0.3, rng=caption_rng(0, 5))
        blobs(prepared, "a", 0)[0].unlink()
        batch = load_batch(prepared, refs, caption_dropout_probability=0.3, rng=caption_rng(0, 5))
        assert batch.files == ["2.png", "1.png", "2.png", "1.png"]
        assert [batch.captions[i] for i in (0, 2, 3)] == [whole.captions[i] for i in (0, 2, 3)]

    def test_a_lost_caption(self, prepared):
        texts = prepared.prompts.cache
        texts._blob("two", "t").unlink()
        for step in range(20):
            batch = load_batch(prepared, [SampleRef("a", 1)], rng=caption_rng(0, step))
            assert batch.captions[0] == "one"
        # "" stands for itself
        texts._blob("", "t").unlink()
        with pytest.raises(LostEntry, match="the embeddings of ''"):
            load_batch(
                prepared,
                [SampleRef("a", 1)],
                caption_dropout_probability=1.0,
                rng=caption_rng(0, 0),
            )

    def test_a_loader_tells_once_and_goes_on(self, prepared, caplog):
        blobs(prepared, "a", 2)[0].unlink()
        batches = loader(prepared)
        files = [
            file
            for _ in range(60)
            for batch in [next(batches)]
            if batch.dataset == "a"
            for file in batch.files
        ]
        batches.close()
        assert "2.png" not in files
        assert len(set(files)) == 5
        told = [record.message for record in caplog.records if "2.png" in record.message]
        assert len(told) == 1
        assert "in their place" in told[0]


def loader(prepared, step=0, state=None, **options):
    sampler = Sampler(prepared.datasets, seed=3)
    if state is not None:
        assert sampler.load_state_dict(state) == []
    return BatchLoader(prepared, sampler, step=step, caption_dropout_probability=0.3, **options)


def identity(batch):
    return batch.dataset, batch.files, batch.captions


class TestLoader:
    def test_it_gives_what_the_sampler_draws(self, prepared):
        sampler = Sampler(prepared.datasets, seed=3)
        batches = loader(prepared)
        for step in range(40):
            expected = load_batch(
                prepared,
                sampler.next(step),
                caption_dropout_probability=0.3,
                rng=caption_rng(3, step),
            )
            got = next(batches)
            assert identity(got) == identity(expected)
            assert torch.equal(got.latents, expected.latents)
            assert (batches.epoch, batches.step) == (sampler.epoch, step + 1)
            assert batches.state_dict() == sampler.state_dict()
        batches.close()

    @pytest.mark.parametrize("stop", [0, 5, 14, 23])
    def test_resumed_it_goes_on_exactly(self, prepared, stop):
        first = loader(prepared)
        whole = [identity(next(first)) for _ in range(40)]
        first.close()
        second = loader(prepared, read_ahead=5)
        assert [identity(next(second)) for _ in range(stop)] == whole[:stop]
        state = json.loads(json.dumps(second.state_dict()))
        second.close()
        third = loader(prepared, step=stop, state=state)
        assert [identity(next(third)) for _ in range(40 - stop)] == whole[stop:]
        third.close()

    def test_it_knows_the_last_batch_of_an_epoch(self, prepared):
        batches, ends = loader(prepared), []
        epochs = []
        for _ in range(40):
            next(batches)
            epochs.append(batches.epoch)
            ends.append(batches.ends_epoch)
        batches.close()
        assert epochs[-1] > 2
        assert ends[:-1] == [after > before for before, after in pairwise(epochs)]

    def test_what_can_not_be_read_next_ends_no_epoch(self, prepared):
        last = [replace(dataset, end_step=3) for dataset in prepared.datasets]
        batches = loader(replace(prepared, datasets=tuple(last)))
        for _ in range(3):
            next(batches)
        assert not batches.ends_epoch
        with pytest.raises(ValueError, match="no dataset takes part"):
            next(batches)
        batches.close()

    def test_an_error_comes_up_at_its_own_batch(self, prepared):
        batches = loader(prepared, read_ahead=3)
        next(batches)
        # the ones read ahead are still good
        wait([*batches._ahead])
        for path in prepared.datasets[0].cache.folder.glob("*.safetensors"):
            path.unlink()
        for _ in range(3):
            next(batches)
        with pytest.raises(ValueError, match="not in the cache any more"):
            next(batches)
        batches.close()

    def test_close_ends_the_thread(self, prepared):
        batches = loader(prepared)
        next(batches)
        assert any(thread.name.startswith("fluxfast-batches") for thread in threading.enumerate())
        batches.close()
        assert not any(
            thread.name.startswith("fluxfast-batches") for thread in threading.enumerate()
        )
