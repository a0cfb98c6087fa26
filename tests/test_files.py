"""Files and folders appear whole or not at all, even if the writer dies between two steps."""

import os

import pytest

from fluxfast import files


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "a" / "state.json"
    files.write_atomic(path, b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (type(path), "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["state.json"]


def test_folder_takes_its_name_only_when_filled(tmp_path):
    path = tmp_path / "checkpoint-1"
    with files.atomic_folder(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(FileNotFoundError), files.atomic_folder(path) as folder:
        (folder / "absent").read_text()
    assert (path / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    with files.atomic_folder(path) as folder:
        (folder / "b").write_text("3")
    assert [p.name for p in path.iterdir()] == ["b"]


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
def test_folder_survives_a_kill_between_any_two_calls(tmp_path, call):
    """A child is killed in its n-th system call of each kind; what stands is complete."""
    path = tmp_path / "checkpoint-1"
    outcomes = set()
    for n in range(8):
        with files.atomic_folder(path) as folder:
            (folder / "a").write_text("old")
            (folder / "b").write_text("old")
        pid = os.fork()
        if pid == 0:
            _die_at(call, n)
            with files.atomic_folder(path) as folder:
                (folder / "a").write_text("new")
                (folder / "b").write_text("new")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        content = {p.name: p.read_text() for p in path.iterdir()} if path.exists() else None
        # between the old folder's removal and the new one's renaming there is none: absent, never
        # partial
        assert content in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"}, None)
        outcomes.add(str(content))
        files.remove_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ([path.name] if content else [])
        if status == 0:
            break
    assert len(outcomes) > 1 or call == "mkdir"


def _die_at(call, n):
    """Make this process kill itself at the n-th use of an os function, or of its method of Path."""
    import pathlib

    count = [0]

    def dying(original):
        def wrapper(*args, **kwargs):
            if count[0] == n:
                os._exit(9)
            count[0] += 1
            return original(*args, **kwargs)

        return wrapper

    if call == "fsync":
        os.fsync = dying(os.fsync)
    else:
        setattr(pathlib.Path, call, dying(getattr(pathlib.Path, call)))


@pytest.mark.parametrize("text", ["cat", "日本語 😀", "a, (b)'s", "photo.v2", "-dash", "x" * 100])
def test_a_text_that_every_file_system_takes_is_its_own_name(text):
    assert files.safe_name(text) == text


ODD_TEXTS = [
    "",
    ".",
    "..",
    "...",
    "a/b",
    "a:b",
    "a\\b",
    "a\nb",
    "a\0b",
    "a_b?",
    " a",
    "a ",
    "a.",
    "CON",
    "con.txt",
    "x" * 300,
    "x" * 301,
    "é" * 300,
    "\ud800",
    "M\udcfcnchen",
    "../up",
    "/etc/passwd",
    ".hidden",
    "a\u2028b",
    "a<b>",
]


def test_other_texts_become_distinct_names(tmp_path):
    names = [files.safe_name(text) for text in ODD_TEXTS]
    # also on a file system that doesn't tell cases apart
    assert len({name.casefold() for name in names}) == len(ODD_TEXTS)
    for name in names:
        # room is left for what stands around it, and for a temporary name
        path = tmp_path / f"step_1000000_{name}_0_2048x2048.png"
        files.write_atomic(path, b"x")
        assert path.parent == tmp_path
    assert len(list(tmp_path.iterdir())) == len(ODD_TEXTS)
    assert files.safe_name("a/b").startswith("a_b-")
