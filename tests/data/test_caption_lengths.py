"""Captions over the encoders' limits: counted by the run's tokenizers, or estimated and said so."""

import pytest

from fluxfast.data.caption_lengths import long_captions, token_counter
from fluxfast.data.encoders import TextEncoders


def files(found):
    return [(each.file, each.tokens) for each in found]


def test_the_limits_are_exact_with_the_tokenizers(pipeline_folder, caplog):
    """The tiny tokenizers have a token a letter, CLIP's two more for the ends and T5's one more."""
    counter = token_counter((str(pipeline_folder), None, None), max_length=100)
    assert not counter.estimated and (counter.clip_limit, counter.t5_limit) == (77, 100)
    texts = {"c75": "c" * 75, "c76": "c" * 76, "t98": "t" * 98, "t99": "t" * 99}
    found = long_captions(texts.items(), counter)
    assert found.total == 4
    assert files(found.clip) == [("c76", 78), ("t98", 100), ("t99", 101)]
    # T5's tokenizer puts a mark before the first word
    assert files(found.t5) == [("t99", 101)]
    # what is said to be cut is what the encoders cut
    encoders = TextEncoders.from_pretrained((str(pipeline_folder), None, None), max_length=100)
    encoders.encode(list(texts.values()))
    cut = [record.args[0] for record in caplog.records if "is cut to" in record.msg]
    assert cut == [101]


@pytest.mark.parametrize("path", ["nobody/holds-this", "absent folder", "broken"])
def test_without_the_tokenizers_it_is_an_estimate(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / "broken" / part).mkdir(parents=True)
        (tmp_path / "broken" / part / "tokenizer.json").write_text("{")
    counter = token_counter((path, None, None), max_length=512)
    assert path in counter.estimated
    found = long_captions([("a", "word " * 60), ("b", "word " * 80), ("c", "猫" * 800)], counter)
    assert files(found.clip) == [("b", 102), ("c", 602)]
    assert files(found.t5) == [("c", 602)]


def test_no_captions(pipeline_folder):
    found = long_captions([], token_counter((str(pipeline_folder), None, None), max_length=8))
    assert (found.total, found.t5, found.clip) == (0, [], [])
