"""Captions whose tags come in other orders: which orders, where from, and what they cost."""

from itertools import permutations

import pytest
from prepare_cases import NOTHING, config, rendered

from fluxfast.config.caption_shuffle import CaptionShuffle, caption_variants
from fluxfast.data.captions import captions
from fluxfast.data.prepare import prepare

DOG = "dog, running, park, sunny day"


def shuffled(caption, run_seed=0, **options):
    return caption_variants(CaptionShuffle(enable=True, **options), seed=run_seed)(caption)


def test_the_first_tags_stay_and_the_others_change_places():
    original, *others = shuffled(DOG, count=2, position_start=1)
    assert original == DOG
    assert len({DOG, *others}) == 3
    for caption in others:
        first, *rest = caption.split(", ")
        assert first == "dog"
        assert sorted(rest) == ["park", "running", "sunny day"]
    assert shuffled(DOG, count=2, position_start=1, include_original=False) == others


def test_there_are_no_more_variants_than_orders():
    whole = shuffled("a, b, c", count=50)
    assert sorted(whole) == sorted(", ".join(order) for order in permutations("abc"))
    assert sorted(shuffled("a,a,b", count=50)[1:]) == ["a, b, a", "b, a, a"]
    assert len(shuffled("a, b, c, d, e", count=7)) == 8


@pytest.mark.parametrize("caption", ["dog, running", "dog", "", "dog, x, x", "dog, x,,"])
def test_a_caption_without_two_tags_to_exchange_stays_as_written(caption):
    kept = []
    for include, told in ((True, []), (False, [caption])):
        shuffle = CaptionShuffle(enable=True, position_start=1, include_original=include)
        assert caption_variants(shuffle, seed=0, on_kept=kept.append)(caption) == [caption]
        assert kept == told


@pytest.mark.parametrize(
    ("split_on", "caption", "other"),
    [
        ("comma", "a b ,c. d", "c. d, a b"),
        ("space", "a,  b", "b a,"),
        ("period", "A dog. It runs.", "It runs. A dog."),
        ("period", "v1.5", "5. v1"),
    ],
)
def test_what_separates_tags_joins_them(split_on, caption, other):
    assert shuffled(caption, split_on=split_on) == [caption, other]


def test_orders_follow_from_seed_and_caption():
    many = ", ".join("abcdefgh")
    assert shuffled(many, 1) == shuffled(many, 1) != shuffled(many, 2)
    # the dataset's own seed goes before the run's
    assert shuffled(many, 1, seed=5) == shuffled(many, 2, seed=5) == shuffled(many, 5)
    # raising `count` keeps the variants that are there, so only the further ones are encoded
    assert shuffled(many, count=4)[:3] == shuffled(many, count=2)


def test_each_caption_is_shuffled_behind_the_instance_prompt(tmp_path):
    variants = caption_variants(CaptionShuffle(enable=True), seed=0)
    (tmp_path / "a.txt").write_text("a, b\nc, d\nb, a\n")
    path = tmp_path / "a.png"
    found = captions(path, strategy="textfile", variants=variants)
    assert found == ["a, b", "b, a", "c, d", "d, c"]
    found = captions(
        path,
        strategy="textfile",
        variants=variants,
        instance_prompt="sks, x",
        prepend_instance_prompt=True,
    )
    assert found == ["sks, x a, b", "sks, x b, a", "sks, x c, d", "sks, x d, c"]
    for options in ({"strategy": "instanceprompt"}, {"only_instance_prompt": True}):
        found = captions(path, variants=variants, instance_prompt="sks, x", **options)
        assert found == ["sks, x", "x, sks"]


def test_only_new_orders_are_encoded(tmp_path, folder, settings, encoders):
    for name in ("wide_0.png", "wide_1.png"):
        (folder / name).rename(folder / name.replace("_", ", b, c "))
    prepare(config(tmp_path), settings)

    def start(**shuffle):
        encoders.reset()
        return prepare(config(tmp_path, caption_shuffle={"enable": True, **shuffle}), settings)

    first = start(count=2)
    samples = {sample.file: sample.captions for sample in first.datasets[0].samples}
    assert samples["wide_2.png"] == ("wide 2",)
    assert len(set(samples["wide, b, c 0.png"])) == 3
    assert encoders.loaded == ["text"]
    assert sorted(encoders.texts) == sorted(
        caption for i in (0, 1) for caption in samples[f"wide, b, c {i}.png"][1:]
    )
    again = start(count=2)
    assert encoders == NOTHING
    assert again.datasets[0].samples == first.datasets[0].samples
    start(count=3)
    assert len(encoders.texts) == 2
    without = start(count=2, include_original=False)
    assert encoders == NOTHING
    told = rendered(without.report)
    assert "set0: 4 captions have no two tags to exchange" in told
    assert '(such as "tall 0")' in told
