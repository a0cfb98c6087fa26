"""Damaged, lost and half-written cache files are noticed, named and computed again."""

import errno
import itertools
import logging
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from cache_cases import blob, same, tensors

from fluxfast.data.cache import CacheNotWritten, TensorCache
from fluxfast.data.cache_index import stamp


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-5])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "bit flipped in the data":
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif how == "dtype changed in the header":
        path.write_bytes(data.replace(b'"BF16"', b'"F16" ', 1))
    elif how == "garbage":
        path.write_bytes(os.urandom(len(data)))
    else:
        path.unlink()


DAMAGE = [
    "cut",
    "emptied",
    "bit flipped in the data",
    "dtype changed in the header",
    "garbage",
    "gone",
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_absent_and_named(cache, caplog, how):
    cache.put("a", "f", tensors())
    cache.put("b", "f", tensors(1))
    path = cache._blob("a", "f")
    damage(path, how)
    assert cache.missing([("a", "f"), ("b", "f")]) == [("a", "f")]
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert cache.get("a", "f") is None
    cache.put("a", "f", tensors())
    assert same(cache.get("a", "f"), tensors())


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_met_while_reading_is_recomputed_by_the_next_start(cache, how):
    cache.put("a", "f", tensors())
    path = cache._blob("a", "f")
    stat = path.stat()
    damage(path, how)
    if path.exists():
        # as a failing disk would
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get("a", "f") is None
    assert TensorCache(cache.folder).missing([("a", "f")]) == [("a", "f")]


def test_one_entrys_file_under_anothers_name_is_not_taken_for_it(cache):
    cache.put("a", "f", tensors())
    cache._blob("b", "f").write_bytes(cache._blob("a", "f").read_bytes())
    assert cache.missing([("b", "f")]) == [("b", "f")]


@pytest.mark.parametrize("index", ["deleted", "garbage", "truncated", "another version"])
def test_a_lost_index_is_made_anew(cache, index, caplog):
    cache.put("a", "f", tensors())
    cache.close()
    path = cache.folder / "index.sqlite"
    if index == "deleted":
        path.unlink()
    elif index == "garbage":
        path.write_bytes(os.urandom(5000))
    elif index == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 99")
        db.close()
    again = TensorCache(cache.folder)
    assert again.missing([("a", "f"), ("b", "f")]) == [("b", "f")]
    assert again.missing([("a", "f")]) == []
    assert ("damaged" in caplog.text) == (index != "deleted")


def test_orphaned_temporary_files_are_removed(cache):
    process = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    dead, stem, token = int(process.stdout), "0" * 40, "0" * 32
    here = socket.gethostname()
    orphan = cache.folder / f".{stem}.{here}@{dead}.{token}.tmp"
    mine = cache.folder / f".{stem}.{here}@{os.getpid()}.{token}.tmp"
    elsewhere = cache.folder / f".{stem}.other.host@{dead}.{token}.tmp"
    old = cache.folder / f".{stem}.other.host@1.{token}.tmp"
    not_ours = cache.folder / ".someone.tmp"
    for path in (orphan, mine, elsewhere, old, not_ours):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    TensorCache(cache.folder)
    assert [path.exists() for path in (orphan, mine, elsewhere, old, not_ours)] == [
        False,
        True,
        True,
        False,
        True,
    ]


def test_a_failed_write_leaves_nothing(cache, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheNotWritten, match="No space left"):
        cache.put("a", "f", tensors())
    assert [path.name for path in cache.folder.iterdir()] == ["index.sqlite"]


KILLED = """
import os, pathlib, signal, sys
import torch
from fluxfast.data.cache import TensorCache

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

folder, tensors = pathlib.Path(sys.argv[1]), {"x": torch.arange(1000.0)}
for stage in ("write", "fsync", "rename", "index", "commit"):
    if os.fork():
        os.wait()
        continue
    cache = TensorCache(folder / stage)
    cache.put("before", "f", tensors)
    if stage == "write":
        os.fsync = lambda descriptor: (os.ftruncate(descriptor, 100), die())
    elif stage == "fsync":
        os.fsync = die
    elif stage == "rename":
        pathlib.Path.replace = die
    elif stage == "index":
        cache._index.put_entries = die
    else:
        cache._index._db.execute("BEGIN IMMEDIATE")
        cache._index._db.execute("INSERT INTO entries VALUES ('after', 'stamp', 1.0)")
        die()
    cache.put("after", "f", tensors)
    os._exit(1)
"""


def test_killed_at_any_moment_it_stays_usable(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, env=environment)
    expected = {"x": torch.arange(1000.0)}
    for stage in ("write", "fsync", "rename", "index", "commit"):
        cache = TensorCache(tmp_path / stage)
        assert not list(cache.folder.glob(".*"))
        # renamed but not indexed, it is whole and can be used
        assert cache.missing([("before", "f"), ("after", "f")]) == (
            [] if stage == "index" else [("after", "f")]
        )
        cache.put("after", "f", expected)
        assert cache.missing([("before", "f"), ("after", "f")]) == []
        assert same(cache.get("before", "f"), expected)
        assert same(cache.get("after", "f"), expected)


def flip(path, seed=0):
    """Flip eight bits as a failing disk does, so that the index does not notice."""
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(8):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_unnoticed(cache, key, seed=0):
    path = cache._blob(key, "f")
    flip(path, seed)
    index = TensorCache(cache.folder)._index
    index._do(
        lambda db: db.execute(
            "UPDATE entries SET stamp = ? WHERE file = ?", (stamp(path.stat()), path.name)
        )
    )


def test_a_start_finds_what_a_disk_has_changed(cache, caplog):
    keys = [f"k{i}" for i in range(8)]
    cache.put_many((key, "f", tensors(i)) for i, key in enumerate(keys))
    for seed, key in enumerate(keys[::2]):
        flip_unnoticed(cache, key, seed)
    wanted = [(key, "f") for key in keys]
    assert cache.missing(wanted, verify_seconds=0) == []
    assert cache.missing(wanted) == wanted[::2]
    assert sum("is damaged" in record.message for record in caplog.records) == 4
    assert str(cache._blob("k0", "f")) in caplog.text


def test_a_start_without_time_for_all_goes_on_where_the_last_one_stopped(cache, monkeypatch):
    keys = [f"k{i}" for i in range(6)]
    cache.put_many((key, "f", {"x": torch.zeros(2)}) for key in keys)
    read, original = [], TensorCache.get

    def get(self, key, fingerprint):
        read.append(key)
        return original(self, key, fingerprint)

    monkeypatch.setattr(TensorCache, "get", get)
    # each call of the clock is half a second later
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) / 2)
    for _ in range(3):
        assert cache.missing([(key, "f") for key in keys], verify_seconds=1.5) == []
    assert read == keys


def test_no_flipped_byte_is_read_as_good(cache):
    want = {"a": torch.tensor([1.5, -2.0]), "m": torch.tensor([True, False])}
    cache.put("é", "f", want)
    path = cache._blob("é", "f")
    data = path.read_bytes()
    unharmed = 0
    for position in range(len(data)):
        for value in {data[position] ^ 1, data[position] ^ 128, 0, 32, 34, 49}:
            if value == data[position]:
                continue
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            got = cache.get("é", "f")
            assert got is None or same(got, want), position
            unharmed += got is not None
    # a header may be padded with other blanks
    assert unharmed <= 8


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_file_that_the_system_cannot_read(cache, monkeypatch, caplog, number):
    cache.put("a", "f", tensors())
    path = cache._blob("a", "f")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(path), "read_bytes", fail)
    if number == errno.EIO:
        assert cache.get("a", "f") is None
        assert "Input/output error" in caplog.text
        assert not path.exists()
    else:
        # the file is not at fault, so it is kept
        with pytest.raises(ValueError, match=f"{path}: can't be read: Permission denied"):
            cache.get("a", "f")
        assert path.exists()


def test_warnings_go_to_the_modules_logger(cache, caplog):
    cache.put("a", "f", tensors())
    damage(blob(cache), "cut")
    with caplog.at_level(logging.WARNING, "fluxfast.data.cache"):
        cache.get("a", "f")
    assert caplog.records[0].name == "fluxfast.data.cache"
