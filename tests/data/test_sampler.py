"""Which samples each step trains on, over epochs, resumption and several datasets."""

import json
from collections import Counter

import pytest
import torch

from fluxfast.data.cache import TensorCache
from fluxfast.data.prepared import PreparedDataset, Sample
from fluxfast.data.sampler import Sampler, SampleRef


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return TensorCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make(cache):
    def make(id="cats", sizes=((512, 512),) * 5, **options):
        samples = tuple(
            Sample(f"{i}.png", ("caption",), size, f"{id}/{i}", "f") for i, size in enumerate(sizes)
        )
        return PreparedDataset(id=id, samples=samples, cache=cache, **options)

    return make


SIZES = ((512, 512),) * 7 + ((704, 384),) * 4 + ((384, 704),)


def epoch_of(sampler, step=0):
    """All batches of the epoch that begins at `step`."""
    batches = [sampler.next(step)]
    epoch = sampler.epoch
    while True:
        step += 1
        batch = sampler.next(step)
        if sampler.epoch != epoch:
            return batches
        batches.append(batch)


@pytest.mark.parametrize("repeats", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_an_epoch_covers_each_sample_equally(make, repeats, batch_size):
    dataset = make(sizes=SIZES, repeats=repeats, train_batch_size=batch_size)
    sampler = Sampler([dataset], seed=1)
    batches = epoch_of(sampler)
    assert len(batches) == sampler.batches_per_epoch
    counts = Counter(ref.index for batch in batches for ref in batch)
    for size in set(SIZES):
        indices = [i for i, each in enumerate(SIZES) if each == size]
        samples = len(indices) * (repeats + 1)
        padding = -samples % batch_size
        # padding is spread over the bucket too
        assert all(
            repeats + 1 <= counts[i] <= repeats + 1 + -(-padding // len(indices)) for i in indices
        )
        assert sum(counts[i] for i in indices) == samples + padding


@pytest.mark.parametrize(
    ("batches", "epochs", "accumulation", "steps"),
    [(5, 2, 2, 5), (5, 4, 4, 5), (5, 3, 2, 8), (3, 1, 4, 1), (7, 10, 1, 70)],
)
def test_a_run_of_epochs_is_rounded_up_once(make, batches, epochs, accumulation, steps):
    dataset = make(sizes=((512, 512),) * batches)
    assert (
        Sampler([dataset], seed=1, gradient_accumulation_steps=accumulation).steps(epochs) == steps
    )


@pytest.mark.parametrize(
    ("windows", "epochs", "accumulation", "steps"),
    [
        # the second one is there in epochs 2 and 3 of 3: 5 + 8 + 8 batches
        ({"start_epoch": 2}, 3, 1, 21),
        ({"start_epoch": 2}, 3, 4, 6),
        ({"end_epoch": 1}, 3, 1, 18),
        # it depends on the draws how many of the second one's batches come in time
        ({"end_step": 2}, 1, 1, None),
    ],
)
def test_a_run_of_epochs_counts_what_takes_part(make, windows, epochs, accumulation, steps):
    datasets = [make("a"), make("b", ((512, 512),) * 3, **windows)]
    sampler = Sampler(datasets, seed=1, gradient_accumulation_steps=accumulation)
    counted = sampler.steps(epochs)
    assert steps is None or counted == steps
    assert sampler.epoch == 1
    for number in range(counted * accumulation):
        sampler.next(number)
        if number < (counted - 1) * accumulation:
            assert sampler.epoch <= epochs
    sampler.next(counted * accumulation)
    assert sampler.epoch == epochs + 1


def test_a_last_step_that_nobody_can_fill_is_left_out(make):
    sampler = Sampler([make(end_epoch=2)], seed=1, gradient_accumulation_steps=3)
    # 10 batches, and none after them
    assert sampler.steps(2) == sampler.steps(9) == 3


def test_a_batch_is_of_one_dataset_and_one_bucket(make):
    datasets = [
        make("a", SIZES, train_batch_size=2),
        make("b", SIZES, train_batch_size=3, repeats=2),
    ]
    sampler = Sampler(datasets, seed=2)
    for batch in epoch_of(sampler):
        assert len({ref.dataset for ref in batch}) == 1
        assert len({SIZES[ref.index] for ref in batch}) == 1
        assert len(batch) == {"a": 2, "b": 3}[batch[0].dataset]


def test_passes_are_shuffled_differently(make):
    sampler = Sampler([make(sizes=((512, 512),) * 6, repeats=3)], seed=3)
    order = [batch[0].index for batch in epoch_of(sampler)]
    passes = [tuple(order[start : start + 6]) for start in range(0, 24, 6)]
    assert all(sorted(each) == list(range(6)) for each in passes)
    assert len(set(passes)) == 4
    # and so is the next epoch
    assert [batch[0].index for batch in epoch_of(sampler, 24)] != order


def test_seeds_and_ids_give_other_orders(make):
    def order(seed, id="cats"):
        return [
            [ref.index for ref in batch]
            for batch in epoch_of(Sampler([make(id, SIZES, repeats=1)], seed=seed))
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, "dogs")


def test_buckets_are_drawn_in_proportion_to_what_is_left(make):
    # 20 images, one of another size, and far fewer steps than the epoch has: the odd one comes one
    # time in twenty
    sizes = ((512, 512),) * 19 + ((384, 704),)
    sampler = Sampler([make(sizes=sizes, repeats=1000)], seed=4)
    odd = sum(sampler.next(step)[0].index == 19 for step in range(1000))
    # mean 50, standard deviation 6.9
    assert 25 < odd < 75


@pytest.mark.parametrize(("sampling", "expected"), [("uniform", 0.75), ("auto-weighting", 0.25)])
def test_datasets_are_drawn_by_weight(make, sampling, expected):
    # probability 3 to 1, batches 1 to 9
    datasets = [
        make("a", ((512, 512),) * 10, probability=3, repeats=9),
        make("b", ((512, 512),) * 90, repeats=9),
    ]
    sampler = Sampler(datasets, seed=5, sampling=sampling)
    share = sum(sampler.next(step)[0].dataset == "a" for step in range(100)) / 100
    # four standard deviations of 100 draws
    assert abs(share - expected) < 0.18


def test_dataset_choice_is_torch_multinomial_with_seed_plus_step(make):
    datasets = [make("a", probability=0.3, repeats=99), make("b", probability=0.7, repeats=99)]
    sampler = Sampler(datasets, seed=11, sampling="uniform")
    for step in range(50):
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        expected = "ab"[
            int(torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(11 + step)))
        ]
        assert sampler.next(step)[0].dataset == expected


def test_an_epoch_ends_when_all_are_used_up(make):
    datasets = [make("a", ((512, 512),) * 2), make("b", ((512, 512),) * 8, probability=0.01)]
    batches = epoch_of(Sampler(datasets, seed=6, sampling="uniform"))
    assert Counter(batch[0].dataset for batch in batches) == {"a": 2, "b": 8}


def run(sampler, steps, start=0):
    return [(sampler.next(step), sampler.epoch) for step in range(start, start + steps)]


@pytest.mark.parametrize("stop", [0, 1, 7, 18, 19, 20, 33])
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(make, stop):
    def sampler():
        datasets = [
            make("a", SIZES, train_batch_size=2, repeats=1),
            make("b", SIZES[:6], probability=0.5),
        ]
        return Sampler(datasets, seed=7)

    whole = run(sampler(), 60)
    assert whole[-1][1] > 2
    first = sampler()
    assert run(first, stop) == whole[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    second = sampler()
    assert second.load_state_dict(state) == []
    assert run(second, 60 - stop, stop) == whole[stop:]


class TestResumedWithChanges:
    def resume(self, before, after, **options):
        first = Sampler(before, seed=1)
        run(first, 3)
        second = Sampler(after, **{"seed": 1} | options)
        return second.load_state_dict(first.state_dict()), second

    def test_a_changed_dataset_starts_its_epoch_anew(self, make):
        for changed in (
            make("a", SIZES[:-1]),
            make("a", (*SIZES[:-1], (640, 448))),
            make("a", SIZES, repeats=3),
        ):
            notes, sampler = self.resume([make("a", SIZES), make("b")], [changed, make("b")])
            assert notes == [
                "dataset 'a' has changed since the checkpoint: its part of this epoch starts anew"
            ]
            assert len(epoch_of(sampler, 3)) == Sampler(
                [changed], seed=1
            ).batches_per_epoch + 5 - self.drawn_of_b(make)

    def drawn_of_b(self, make):
        sampler = Sampler([make("a", SIZES), make("b")], seed=1)
        return sum(sampler.next(step)[0].dataset == "b" for step in range(3))

    def test_new_and_gone_datasets_are_told(self, make):
        notes, _ = self.resume([make("a"), make("b")], [make("b"), make("c")])
        assert notes == [
            "dataset 'c' is new since the checkpoint",
            "dataset 'a' of the checkpoint is gone",
        ]

    def test_another_seed_is_told(self, make):
        notes, sampler = self.resume([make("a")], [make("a")], seed=2)
        assert notes == ["the seed was 1 and is 2: this epoch's samples are drawn anew"]
        assert len(epoch_of(sampler, 3)) == 5

    def test_another_batch_size_is_refused(self, make):
        with pytest.raises(
            ValueError, match="with train_batch_size 1, and it is 4 now; resume with 1"
        ):
            self.resume([make("a")], [make("a", train_batch_size=4)])


class TestWindows:
    def drawn(self, datasets, steps, **options):
        sampler = Sampler(datasets, seed=8, **options)
        return [sampler.next(step)[0].dataset for step in range(steps)]

    def test_steps(self, make):
        datasets = [make("low", repeats=99, end_step=30), make("high", repeats=99, start_step=30)]
        drawn = self.drawn(datasets, 60)
        assert set(drawn[:30]) == {"low"}
        assert set(drawn[30:]) == {"high"}

    def test_steps_are_optimiser_steps(self, make):
        datasets = [make("low", repeats=99, end_step=10), make("high", repeats=99, start_step=10)]
        drawn = self.drawn(datasets, 60, gradient_accumulation_steps=3)
        assert set(drawn[:30]) == {"low"}
        assert set(drawn[30:]) == {"high"}

    def test_epochs(self, make):
        datasets = [make("both"), make("first", end_epoch=1), make("second", start_epoch=2)]
        drawn = self.drawn(datasets, 25)
        assert Counter(drawn[:10]) == {"both": 5, "first": 5}
        assert Counter(drawn[10:20]) == {"both": 5, "second": 5}

    def test_an_epoch_does_not_wait_for_datasets_that_take_no_part(self, make):
        datasets = [make("a"), make("late", start_step=1000), make("never", probability=0)]
        sampler = Sampler(datasets, seed=9)
        assert len(epoch_of(sampler)) == 5

    def test_nobody_at_the_start(self, make):
        for late in ({"start_step": 2}, {"start_epoch": 2}, {"probability": 0}):
            with pytest.raises(ValueError, match="no dataset takes part in the first step"):
                Sampler([make("a", **late)], seed=1)
        Sampler([make("a", start_step=1, start_epoch=0)], seed=1)

    def test_nobody_left(self, make):
        sampler = Sampler([make("a", end_step=3)], seed=1)
        run(sampler, 3)
        with pytest.raises(ValueError, match="no dataset takes part in optimiser step 4"):
            sampler.next(3)


def test_references_compare_by_value():
    assert SampleRef("a", 1) == SampleRef("a", 1)
