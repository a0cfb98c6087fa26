"""What is put into the cache comes out of it, for threads, processes and later starts."""

import errno
import multiprocessing
import os
import shutil
import threading

import pytest
from cache_cases import blob, same, tensors

from fluxfast.data import cache as cache_module
from fluxfast.data.cache import CacheNotWritten, TensorCache, fingerprint


def test_round_trip_across_instances(cache):
    cache.put("a/b.png", "f1", tensors())
    for reader in (cache, TensorCache(cache.folder)):
        assert same(reader.get("a/b.png", "f1"), tensors())
        assert reader.missing([("a/b.png", "f1")]) == []


def test_fingerprints_are_separate_entries(cache):
    cache.put("a", "f1", tensors(1))
    assert cache.get("a", "f2") is None
    assert cache.missing([("a", "f2"), ("b", "f1"), ("a", "f1"), ("a", "f2")]) == [
        ("a", "f2"),
        ("b", "f1"),
    ]
    cache.put("a", "f2", tensors(2))
    assert same(cache.get("a", "f1"), tensors(1))
    assert same(cache.get("a", "f2"), tensors(2))


def test_an_entry_can_be_replaced(cache):
    cache.put("a", "f", tensors(1))
    cache.put("a", "f", tensors(2, size=9))
    assert same(cache.get("a", "f"), tensors(2, size=9))
    assert cache.missing([("a", "f")]) == []
    blob(cache)


def test_an_earlier_name_is_given_up(cache):
    cache.put("set/a.png", "f", tensors(1))
    cache.put("set/b.png", "f", tensors(2))
    cache.put("b", "f", tensors(3))
    renamed = {("a", "f"): ("set/a.png", "f"), ("c", "f"): ("set/c.png", "f")}
    assert cache.adopt(renamed) == [("c", "f")]
    assert same(cache.get("a", "f"), tensors(1)) and cache.get("set/a.png", "f") is None
    assert cache.missing([("a", "f"), ("set/a.png", "f")]) == [("set/a.png", "f")]


def test_touched_and_copied_files_are_checked_not_recomputed(cache, tmp_path):
    cache.put("a", "f", tensors())
    os.utime(blob(cache))
    assert cache.missing([("a", "f")]) == []
    cache.close()
    moved = cache.folder.rename(tmp_path / "elsewhere")
    os.utime(moved / blob(TensorCache(moved)).name)
    assert TensorCache(moved).missing([("a", "f")]) == []
    # the index holds no absolute path, so the folder can be moved
    assert str(tmp_path).encode() not in (moved / "index.sqlite").read_bytes()


def _fill(folder, worker):
    cache = TensorCache(folder)
    for i in range(25):
        cache.put(f"shared{i}", "f", tensors(i))
        cache.put(f"own{worker}-{i}", "f", tensors(i))


def test_processes_and_threads_write_at_the_same_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, worker)) for worker in range(2)]
    threads = [threading.Thread(target=_fill, args=(tmp_path, worker)) for worker in range(2, 4)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    cache = TensorCache(tmp_path)
    keys = [f"shared{i}" for i in range(25)] + [
        f"own{worker}-{i}" for worker in range(4) for i in range(25)
    ]
    assert cache.missing([(key, "f") for key in keys]) == []
    for key in keys:
        assert same(cache.get(key, "f"), tensors(int(key.removeprefix("shared").split("-")[-1])))


def test_one_instance_serves_many_threads(cache):
    failures = []

    def work(worker):
        for i in range(10):
            cache.put(f"{worker}-{i}", "f", tensors(i))
            if cache.missing([(f"{worker}-{i}", "f")]) or not same(
                cache.get(f"{worker}-{i}", "f"), tensors(i)
            ):
                failures.append((worker, i))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_file_facts_hold_until_the_file_is_written(cache, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(b"12345")
    cache.remember_files([("image.png", file.stat(), {"size": [3, 4]})])
    again = TensorCache(cache.folder)
    assert again.file_facts("image.png", file.stat()) == {"size": [3, 4]}
    assert again.file_facts("other.png", file.stat()) is None
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert again.file_facts("image.png", file.stat()) is None


@pytest.mark.parametrize("how", ["copied over", "renamed over", "written in place"])
def test_a_file_replaced_by_one_of_equal_size_and_time_is_another(cache, tmp_path, how):
    file, other = tmp_path / "image.png", tmp_path / "other.png"
    file.write_bytes(b"12345")
    other.write_bytes(b"54321")
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache.remember_files([("image.png", stat, {"size": [3, 4]})])
    # as cp -p, rsync -t and git checkout copy files
    if how == "copied over":
        shutil.copy2(other, file)
    elif how == "renamed over":
        other.rename(file)
    else:
        file.write_bytes(b"54321")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert cache.file_facts("image.png", file.stat()) is None


# a name from a file system, half of a character from JSON, and texts that look like them
ODD_KEYS = [
    b"M\xfcnchen.png".decode(errors="surrogateescape"),
    "M\\xfcnchen.png",
    "\ud800",
    "a\0b",
    "a\nb",
    "[bold]",
    "'; --",
]


def test_keys_and_names_may_be_any_strings(cache, tmp_path):
    file = tmp_path / "image.png"
    file.touch()
    for number, key in enumerate(ODD_KEYS):
        cache.put(key, "f", tensors(number))
        cache.remember_files([(key, file.stat(), {"number": number})])
    again = TensorCache(cache.folder)
    assert again.missing([(key, "f") for key in ODD_KEYS]) == []
    for number, key in enumerate(ODD_KEYS):
        assert same(again.get(key, "f"), tensors(number))
        assert again.file_facts(key, file.stat()) == {"number": number}
    assert len({fingerprint(key) for key in ODD_KEYS}) == len(ODD_KEYS)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache folder .*file: can't be created"):
        TensorCache(tmp_path / "file")
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(ValueError, match=r"cache index .*index.sqlite: can't be used"):
        TensorCache(tmp_path)


def _no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_the_folder_and_loses_nothing(cache, monkeypatch):
    whole = cache_module._write_whole

    def full_after_one(path, data):
        if list(path.parent.glob("*.safetensors")):
            _no_room()
        whole(path, data)

    monkeypatch.setattr(cache_module, "_write_whole", full_after_one)
    entries = [(key, "f", tensors(number)) for number, key in enumerate("abc")]
    with pytest.raises(CacheNotWritten) as raised:
        cache.put_many(entries)
    for part in (str(cache.folder), '"b"', os.strerror(errno.ENOSPC), "GB left", "Make room"):
        assert part in str(raised.value)
    monkeypatch.undo()
    again = TensorCache(cache.folder)
    assert again.missing([(key, "f") for key in "abc"]) == [("b", "f"), ("c", "f")]
    assert same(again.get("a", "f"), tensors(0))


def test_what_can_be_done_without_is_told_once_until_there_is_room(cache, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "_write_whole", _no_room)
    for key in "abc":
        cache.put_if_possible(key, "f", tensors())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(cache.folder) in caplog.text and "computed whenever it is needed" in caplog.text
    monkeypatch.undo()
    cache.put_if_possible("a", "f", tensors())
    assert same(cache.get("a", "f"), tensors())
    monkeypatch.setattr(cache_module, "_write_whole", _no_room)
    cache.put_if_possible("b", "f", tensors())
    assert len(caplog.records) == 2


def test_fingerprint():
    assert fingerprint("a", 1, {"x": 1, "y": [2]}) == fingerprint("a", 1, {"y": (2,), "x": 1})
    assert (
        len(
            {
                fingerprint("a", 1),
                fingerprint("a", "1"),
                fingerprint("a1"),
                fingerprint(["a", 1]),
                fingerprint(),
            }
        )
        == 5
    )
