"""Names of validation's pictures."""

from fluxfast.files import temporary_name
from fluxfast.train.validation import file_name


def test_nicknames_are_names_of_files(tmp_path):
    assert file_name(3, "a red cup", 0, (64, 48)) == "step_3_a red cup_0_64x48.png"
    assert file_name(0, "a/b\0c", 1, (64, 64)).startswith("step_0_a_b_c-")
    assert file_name(0, "a/b\0c", 1, (64, 64)) != file_name(0, "a_b\0c", 1, (64, 64))
    names = {
        file_name(10**6, start + "é" * 200 + end, 0, (1024, 1024)) for start in "ab" for end in "cd"
    }
    assert len(names) == 4
    for name in names:
        with temporary_name(tmp_path / name).open("wb"):
            (tmp_path / name).write_bytes(b"")
