import os
import sys

import pytest

from fluxfast.text import is_text, lines, printable, text_problem, to_bytes, wrapped

MUNICH = b"M\xfcnchen.png".decode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a photo, 日本語 😀", "a photo, 日本語 😀"),
        (MUNICH, "M\\xfcnchen.png"),
        ("\ud800", "\\ud800"),
        ("one\ntwo\ttab", "one\\ntwo\\ttab"),
        ("\x1b[31mred\0", "\\x1b[31mred\\x00"),
        ("a\u2028b\x85", "a\\u2028b\\x85"),
        ("[bold]", "[bold]"),
        ("ideographic\u3000space", "ideographic\u3000space"),
    ],
)
def test_printable_is_one_line_of_utf8(text, shown):
    assert printable(text) == shown
    assert shown.encode().decode() == shown


def test_bytes_are_utf8_where_there_is_one_and_distinct_elsewhere():
    assert to_bytes("é") == "é".encode()
    assert (
        len(
            {
                to_bytes(text)
                for text in (MUNICH, "M\\xfcnchen.png", "Mnchen.png", "München.png", "\ud800")
            }
        )
        == 5
    )


def test_only_newlines_end_a_line():
    assert lines("a\nb\r\nc") == ["a", "b", "c"]
    for character in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r":
        assert lines(f"a{character}b") == [f"a{character}b"]


@pytest.mark.parametrize(
    ("text", "as_text", "as_name"),
    [
        ("fine, 日本", None, None),
        ("a\0b", "zero character", "zero character"),
        ("a\ud800", "half of a character (\\ud800)", "half of a character (\\ud800)"),
        # the only way to name a file whose name is no UTF-8
        (MUNICH, "no UTF-8 (\\xfc)", None),
    ],
)
def test_what_a_config_may_not_hold(text, as_text, as_name):
    for problem, expected in (
        (text_problem(text), as_text),
        (text_problem(text, file_name=True), as_name),
    ):
        assert (problem is None) == (expected is None)
        assert expected is None or expected in problem
    assert is_text(text) == (as_text in (None, "zero character"))


def test_a_system_whose_names_are_ascii(monkeypatch):
    def fsencode(name):
        return name.encode("ascii", "surrogateescape")

    monkeypatch.setattr(os, "fsencode", fsencode)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "PYTHONUTF8=1" in text_problem("ü", file_name=True)
    assert text_problem(MUNICH, file_name=True) is None


def test_texts_are_wrapped_between_words_and_paths_stay_whole():
    path = "/a/path/that/is-longer/than-the/line/" + "x" * 40
    text = wrapped(f"· a note about {path} with some more words behind it", 40)
    assert text.splitlines() == [
        "· a note about", f"  {path}", "  with some more words behind it",
    ]  # fmt: skip
    assert wrapped("one\n\n  two three", 8) == "one\n\n  two\n  three"
    assert wrapped("short", 80) == "short"
    assert wrapped("  2. one two three", 12) == "  2. one two\n     three"
