"""The index of the cache, whole, damaged, and used by several threads."""

import contextlib
import random
import sqlite3

import pytest

from fluxfast.data.cache_index import Index

ENTRIES = [(f"{i:040x}.safetensors", f"{i} 179{i} {i} 17{i}") for i in range(40)]
FACTS = [
    (f"set/image {i}.png", f"{i} 17 {i} 9", {"size": [100 + i, 200], "sha256": f"{i:064x}"})
    for i in range(30)
]


@pytest.fixture
def filled(tmp_path):
    """The bytes of an index that holds all of the above."""
    index = Index(tmp_path / "filled.sqlite")
    index.put_entries(ENTRIES)
    index.put_facts(FACTS)
    index.close()
    return (tmp_path / "filled.sqlite").read_bytes()


def test_it_holds_what_it_was_told(tmp_path, filled):
    (tmp_path / "a.sqlite").write_bytes(filled)
    index = Index(tmp_path / "a.sqlite")
    assert {file: known.stamp for file, known in index.entries().items()} == dict(ENTRIES)
    for name, stamp, facts in FACTS:
        assert index.facts(name, stamp) == facts
        assert index.facts(name, "1 2 3 4") is None
    assert index.facts("another", "1 2 3 4") is None


def test_uses_are_those_of_the_last_owner(tmp_path, filled):
    """An index without the table, as an earlier version made it, gets it and keeps the rest."""
    path = tmp_path / "a.sqlite"
    path.write_bytes(filled)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP TABLE uses")
        db.commit()
    index = Index(path)
    assert index.uses() == {}
    index.put_uses(["a", "b"], "cats")
    index.put_uses(["b"], "dogs")
    uses = index.uses()
    assert {file: use.owner for file, use in uses.items()} == {"a": "cats", "b": "dogs"}
    assert uses["a"].used <= uses["b"].used
    assert len(index.entries()) == len(ENTRIES)
    index.forget_entries(["a"])
    assert list(index.uses()) == ["b"]


def check(path, data):
    """Whatever happened to the index: what it says is right, and it can be used."""
    path.write_bytes(data)
    index = Index(path)
    index.entries()
    for name, stamp, facts in FACTS:
        assert index.facts(name, stamp) in (facts, None)
    index.put_entries(ENTRIES)
    index.put_facts(FACTS)
    index.close()


def test_no_flipped_bytes_give_wrong_facts_or_end_a_run(tmp_path, filled):
    rng = random.Random(0)
    for number in range(50):
        data = bytearray(filled)
        # the first page holds the schema, where a single byte matters most
        for _ in range(rng.choice((1, 8, 64))):
            data[rng.randrange(200 if number % 2 else len(data))] = rng.randrange(256)
        check(tmp_path / f"{number}.sqlite", bytes(data))


def test_damage_that_shows_while_it_is_used(tmp_path, caplog, filled):
    path = tmp_path / "a.sqlite"
    path.write_bytes(filled)
    index = Index(path)
    with path.open("r+b") as file:
        # from the counter of changes on, without which SQLite would not look at the pages that it
        # has read
        file.seek(24)
        file.write(b"\xff" * (len(filled) - 24))
    assert index.entries() == {}
    assert f"cache index {path} is damaged" in caplog.text
    index.put_facts(FACTS)
    assert index.facts(*FACTS[0][:2]) == FACTS[0][2]


def test_a_busy_or_full_disk_is_no_damage(tmp_path, filled):
    path = tmp_path / "a.sqlite"
    path.write_bytes(filled)
    index = Index(path)

    def full(db):
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(ValueError, match=r"a\.sqlite: can't be used: database or disk is full"):
        index._do(full)
    assert {*index.entries()} == {file for file, _ in ENTRIES}
