import json
import threading
from collections import Counter
from concurrent.futures import wait

import pytest
import torch

from fluxfast.data.batches import BatchLoader, caption_rng, load_batch
from fluxfast.data.cache import TensorCache
from fluxfast.data.prepared import Prepared, PreparedDataset, PromptCache, Sample
from fluxfast.data.report import Report
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
            images.put(f"{id}/{i}", "l", {"latents": torch.full((16, 6, width), float(i), dtype=torch.bfloat16)})
            samples.append(Sample(f"{i}.png", ("one", "two", "three")[: 1 + i % 3], (width * 8, 48), f"{id}/{i}", "l"))
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
    return Prepared(tuple(datasets), PromptCache(texts, "t"), Report([], 3, 0))


def test_a_batch_holds_what_the_caches_do(prepared):
    batch = load_batch(prepared, [SampleRef("b", 1), SampleRef("b", 2)], rng=caption_rng(0, 0))
    assert batch.latents.shape == (2, 16, 6, 8)
    assert batch.latents.dtype == batch.prompt_embeds.dtype == torch.bfloat16
    assert batch.latents[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.files == ["1.png", "2.png"]
    assert (batch.dataset, batch.is_regularisation_data, batch.timestep_sampling_offset) == ("b", True, 0.5)
    for i, caption in enumerate(batch.captions):
        assert caption in ("one", "two", "three")
        assert batch.prompt_embeds[i].unique().tolist() == [value(caption)]
        assert batch.pooled_prompt_embeds[i].unique().tolist() == [float(torch.tensor(value(caption) + 1).bfloat16())]
        assert batch.attention_mask[i].sum() == min(4, len(caption))


def test_captions_are_picked_evenly_and_dropped_with_the_given_probability(prepared):
    counts = Counter()
    for step in range(600):
        batch = load_batch(prepared, [SampleRef("a", 2)], caption_dropout_probability=0.25, rng=caption_rng(1, step))
        counts[batch.captions[0]] += 1
        expected = value(batch.captions[0])
        assert batch.prompt_embeds.unique().tolist() == [float(torch.tensor(expected).bfloat16())]
    # 150 each; five standard deviations are 53
    assert all(97 < counts[caption] < 203 for caption in PROMPTS)


def test_dropout_of_none_and_all(prepared):
    refs = [SampleRef("a", 0)] * 20
    assert set(load_batch(prepared, refs, rng=caption_rng(0, 0)).captions) == {"one"}
    assert set(load_batch(prepared, refs, caption_dropout_probability=1.0, rng=caption_rng(0, 0)).captions) == {""}


def test_a_lost_cache_file_is_named(prepared):
    for path in prepared.datasets[0].cache.folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"vae: the latents of 0.png \(dataset 'a'\) are not in the cache any more"):
        load_batch(prepared, [SampleRef("a", 0)], rng=caption_rng(0, 0))


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
            expected = load_batch(prepared, sampler.next(step), caption_dropout_probability=0.3, rng=caption_rng(3, step))
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
        assert not any(thread.name.startswith("fluxfast-batches") for thread in threading.enumerate())
