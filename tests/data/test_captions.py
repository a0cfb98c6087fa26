"""Captions from names, text files and prompts, and images without a usable one."""

import random

import pytest

from fluxfast.config.caption_filter import caption_filter
from fluxfast.data.captions import NoCaption, captions, pick


def test_filename():
    assert captions("/a/b/A_photo_of__a cat.v2.png") == ["A photo of  a cat.v2"]


def test_a_name_that_is_no_text_gives_no_caption():
    path = b"caf\xe9.png".decode(errors="surrogateescape")
    with pytest.raises(NoCaption, match="its name, which is to be its caption, is not UTF-8"):
        captions(path)
    assert captions(path, strategy="instanceprompt", instance_prompt="x") == ["x"]


def test_instanceprompt():
    for strategy in ("instanceprompt", "instance_prompt"):
        assert captions("a.png", strategy=strategy, instance_prompt="sks dog") == ["sks dog"]
    with pytest.raises(ValueError, match="instanceprompt needs an instance_prompt"):
        captions("a.png", strategy="instanceprompt")


def test_only_and_prepended_instance_prompt():
    assert captions("a_b.png", only_instance_prompt=True, instance_prompt="sks") == ["sks"]
    assert captions("a_b.png", prepend_instance_prompt=True, instance_prompt="sks") == ["sks a b"]
    for option in ("only_instance_prompt", "prepend_instance_prompt"):
        with pytest.raises(ValueError, match=f"{option} needs an instance_prompt"):
            captions("a.png", **{option: True})


class TestTextfile:
    def read(self, folder, text, **options):
        (folder / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return captions(folder / "a.png", strategy="textfile", **options)

    def test_each_line_is_a_caption(self, tmp_path):
        assert self.read(tmp_path, "one\r\n\r\n  two \nöne\none\n") == ["one", "two", "öne"]

    def test_other_breaks_belong_to_the_caption(self, tmp_path):
        # what Word, PDFs and old programs leave in pasted text; SimpleTuner splits at newlines
        # alone
        for character in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r":
            assert self.read(tmp_path, f"one{character}more\ntwo\n") == [
                f"one{character}more",
                "two",
            ]

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        assert self.read(tmp_path, b"\xef\xbb\xbfone") == ["one"]

    def test_unsplit(self, tmp_path):
        for text in ("one\ntwo\n", "one\r\ntwo\r\n"):
            assert self.read(tmp_path, text, disable_multiline_split=True) == ["one\ntwo"]

    def test_prepended_to_each(self, tmp_path):
        assert self.read(
            tmp_path, "one\ntwo", prepend_instance_prompt=True, instance_prompt="x"
        ) == ["x one", "x two"]

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (" \n\n", "caption file is empty"),
            (b"\xff\xfe\x00", "UTF-8"),
            (b"it\x92s", "UTF-8"),
            ("utf-16".encode("utf-16"), "UTF-8"),
        ],
    )
    def test_unusable(self, tmp_path, text, reason):
        with pytest.raises(NoCaption, match=reason) as caught:
            self.read(tmp_path, text)
        assert caught.value.path == tmp_path / "a.png"

    def test_missing(self, tmp_path):
        with pytest.raises(NoCaption, match="no caption file beside it"):
            captions(tmp_path / "a.png", strategy="textfile")


class TestFilter:
    def test_removes_matches_and_replaces_the_first(self):
        apply = caption_filter(
            ["arafed ", "this .* has a ", "^start ", r"s/cat/dog/", r"s/a\/b/c\1/"]
        )
        assert apply("start arafed man, arafed cat and cat a/b") == r"man, dog and cat c\1"
        assert apply("well, this old thing has a roof") == "well, roof"

    def test_an_entry_that_is_no_expression_is_named(self):
        with pytest.raises(
            ValueError, match=r"caption_filter_list: '\(' is not a regular expression"
        ):
            caption_filter(["fine", "("])

    def test_edits_captions_before_the_instance_prompt(self):
        edit = caption_filter(["blurry "])
        options = {
            "caption_filter": edit,
            "prepend_instance_prompt": True,
            "instance_prompt": "blurry x",
        }
        assert captions("blurry_cat.png", **options) == ["blurry x cat"]
        with pytest.raises(NoCaption, match="its caption is empty"):
            captions("blurry_.png", caption_filter=caption_filter(["blurry"]))


def test_pick_reaches_every_caption():
    assert {pick(["a", "b", "c"], random.Random(i)) for i in range(50)} == {"a", "b", "c"}
    assert pick(["a", "b", "c"], random.Random(3)) == pick(["a", "b", "c"], random.Random(3))
