"""Runs share a cache: the second encodes nothing, and nobody clears what one of them uses."""

import json
import os
import shutil
import socket
import threading
import time

import pytest

from fluxfast.cli.cache import main
from fluxfast.data import encode
from fluxfast.data.model_folders import file_hash
from fluxfast.train import cache_use
from fluxfast.train.cache_contents import contents
from fluxfast.train.cache_use import clearing, used_since, using
from fluxfast.train.run_lock import FolderInUse

OWN_CACHE = {"cache_dir_vae": ""}
SHORT = {"max_train_steps": 1, "lr_warmup_steps": 0, "base_model_precision": "int8-quanto"}


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "fluxfast"


@pytest.fixture
def in_one_cache(run, monkeypatch, tmp_path, user_cache):
    """Run a config whose entries name no cache; returns what was printed, and what was encoded."""
    encoded = []
    loaded = encode.LatentEncoder.from_pretrained

    def noted(*args, **options):
        encoded.append("images")
        return loaded(*args, **options)

    monkeypatch.setattr(encode.LatentEncoder, "from_pretrained", noted)

    def start(**changes):
        encoded.clear()
        _, out = run(dataset=OWN_CACHE | changes.pop("dataset", {}), **SHORT | changes)
        return out.getvalue(), list(encoded)

    return start


def by_kind(folder):
    found = {}
    for kept in contents(folder):
        found.setdefault(kept.kind, []).append(kept)
    return found


def test_a_second_experiment_encodes_nothing(in_one_cache, workspace, tmp_path, user_cache):
    said, encoded = in_one_cache(name="first")
    assert encoded == ["images"] and "int8, kept in" in said
    assert "· cache: " in said and f"in {user_cache}" in said.replace("\n", "")
    files = {kept.path for kept in contents(user_cache)}
    # another output folder, id and folder of the same images
    shutil.copytree(workspace / "images", tmp_path / "copy")
    said, encoded = in_one_cache(
        name="second", dataset={"id": "others", "instance_data_dir": str(tmp_path / "copy")}
    )
    assert encoded == [] and "int8 from" in said
    assert {kept.path for kept in contents(user_cache)} == files
    assert not (tmp_path / "second" / "cache").exists()
    # another setting makes other latents, and the first ones stay
    _, encoded = in_one_cache(name="third", dataset={"resolution": 128})
    assert encoded == ["images"] and len(by_kind(user_cache)["latents"]) == 8
    _, encoded = in_one_cache(name="fourth")
    assert encoded == []


def test_what_it_holds_is_named(in_one_cache, workspace, user_cache, tmp_path):
    in_one_cache()
    found = by_kind(user_cache)
    assert [kept.owner for kept in found["bases"]] == [f"{workspace}/pipeline/transformer, int8"]
    assert {kept.owner for kept in found["latents"]} == {f"photos ({workspace}/images)"}
    sizes = {kept.path: kept.size for kept in contents(user_cache) if kept.path.is_file()}
    assert sizes == {path: path.stat().st_size for path in sizes} and len(sizes) > 4


def test_an_earlier_versions_latents_go_on_being_used(
    in_one_cache, workspace, tmp_path, user_cache
):
    """They lie in the output folder, named after the dataset's id and the file."""
    in_one_cache(name="first")
    own = tmp_path / "output" / "cache" / "vae" / "photos"
    own.parent.mkdir(parents=True)
    (user_cache / "vae").rename(own)
    (own / "index.sqlite").unlink()
    latents = encode.TensorCache(own)
    for file in list(own.glob("*.safetensors")):
        header = file.read_bytes()
        told = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
        tensors = latents.get(told["key"], told["fingerprint"])
        name = next(
            image.name
            for image in (workspace / "images").glob("*.png")
            if file_hash(image) == told["key"]
        )
        latents.drop([(told["key"], told["fingerprint"])])
        latents.put(f"photos/{name}", told["fingerprint"], tensors)
    latents.close()
    said, encoded = in_one_cache()
    assert encoded == [] and "which an earlier version made, are used" in said
    assert len(list(own.glob("*.safetensors"))) == 4


def test_a_live_run_keeps_what_it_uses(tmp_path, user_cache):
    old, used = (user_cache / "transformer" / f"{n}-int8.safetensors" for n in "ab")
    old.parent.mkdir(parents=True)
    for path in (old, used):
        path.write_bytes(b"x" * 100)
        os.utime(path, (time.time() - 1e6,) * 2)
    with using(user_cache, print):
        os.utime(used)
        assert main(["--clear", "--yes"]) == 0
        assert used.exists() and not old.exists()
    assert used_since(user_cache) is None
    assert main(["--clear", "--yes"]) == 0
    assert not used.exists()


def test_a_killed_run_keeps_nothing(user_cache):
    folder = user_cache / "runs" / "dead"
    folder.mkdir(parents=True)
    (folder / "run.lock").write_text(
        json.dumps({"pid": 1 << 22, "process_started": 1.0, "host": socket.gethostname()})
    )
    assert used_since(user_cache) is None and not folder.exists()
    # a run that is about to lock its folder is left alone
    folder.mkdir()
    assert used_since(user_cache) is None and folder.exists()


def test_a_run_waits_for_who_clears(user_cache, monkeypatch):
    monkeypatch.setattr(cache_use, "_WAIT", 0.01)
    said, entered = [], threading.Event()

    def start():
        with using(user_cache, said.append):
            entered.set()

    with clearing(user_cache, print):
        run = threading.Thread(target=start)
        run.start()
        assert not entered.wait(0.3)
        with pytest.raises(FolderInUse), clearing(user_cache, print):
            pass
    run.join(10)
    assert entered.is_set() and "somebody clears this cache" in said[0]
