"""Names of validation's pictures."""

from PIL import Image

from fluxfast.files import temporary_name
from fluxfast.train.grid import LABELS, side_by_side
from fluxfast.train.image_files import drawn_images, file_name, file_words


def test_nicknames_are_words_in_names_of_files(tmp_path):
    assert file_words(["a red cup", "cat"]) == {"a red cup": "a-red-cup", "cat": "cat"}
    assert file_words(["a/b\0c"])["a/b\0c"].startswith("a_b_c-")
    # those that would be one word, whatever their order in the library
    assert len({*file_words(["a b", "a-b", "a  b", "a/b\0c", "a_b\0c"]).values()}) == 5
    long = [start + "é" * 200 + end for start in "ab" for end in "cd"]
    names = {file_name(10**6, word, 0, (1024, 1024)) for word in file_words(long).values()}
    assert len(names) == 4
    for name in names:
        assert " " not in name
        with temporary_name(tmp_path / name).open("wb"):
            (tmp_path / name).write_bytes(b"")


def test_names_sort_as_steps_do_and_tell_the_base(tmp_path):
    names = [file_name(step, "cat", 0, (64, 48)) for step in (0, 9, 10, 1000, 99999)]
    assert names == sorted(names)
    assert names[0] == "step_000000_cat_base_0_64x48.png"
    assert names[1] == "step_000009_cat_0_64x48.png"


def test_an_earlier_versions_names_are_read_beside_ours(tmp_path):
    for name in (
        "step_0_cat_0_8x8.png", "step_5_cat_0_8x8.png", "step_0_my_base_0_8x8.png",
        "step_000000_dog_base_0_8x8.png", "step_000010_cat_0_8x8.png",
    ):  # fmt: skip
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = [(each.nickname, each.step) for each in drawn_images(tmp_path)]
    assert found == [("cat", 0), ("cat", 5), ("cat", 10), ("dog", 0), ("my_base", 0)]


def test_side_by_side_says_which_is_which_and_is_taken_apart_again(tmp_path):
    base, now = Image.new("RGB", (160, 8), "red"), Image.new("RGB", (160, 8), "blue")
    base.save(tmp_path / file_name(0, "cat", 0, (160, 8)))
    both = side_by_side([("base model", base), ("step 10", now)])
    assert both.size == (320, LABELS + 8)
    labels = [both.crop((left, 0, left + 160, LABELS)) for left in (0, 160)]
    assert all(label.getextrema()[0][0] < 50 for label in labels)
    assert labels[0].tobytes() != labels[1].tobytes()
    both.save(tmp_path / file_name(10, "cat", 0, (160, 8)))
    opened = [each.open() for each in drawn_images(tmp_path)]
    assert [each.tobytes() for each in opened] == [base.tobytes(), now.tobytes()]
