"""Where LoRA files come from: files told by their content, folders, and the Hub."""

import io
import json
import pickle
import zipfile
from functools import partial

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub, serving
from safetensors.torch import save, save_file

from fluxfast.adapters import find_lora
from fluxfast.adapters.lora_read import read_lora

TO_Q = "transformer_blocks.0.attn.to_q"
PAIR = {
    f"transformer.{TO_Q}.lora_A.weight": torch.ones(4, 32),
    f"transformer.{TO_Q}.lora_B.weight": torch.ones(32, 4),
}
LORA = save(PAIR)
NAMED = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "x.bin", "x.pt", "x", "x.lora.v2"])
def test_a_whole_file_is_read_under_any_ending(tmp_path, name):
    (tmp_path / name).write_bytes(LORA)
    assert read_lora(tmp_path / name).targets == [TO_Q]
    assert read_lora(tmp_path).path == tmp_path / name


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"not read")
    return stream.getvalue()


@pytest.mark.parametrize(
    "data", [_zip(), *(pickle.dumps({"a": 1}, protocol) for protocol in (2, 3, 4, 5))]
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
def test_pickles_are_refused_by_content(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: a pickle, .*never loaded"):
        read_lora(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused_by_name(tmp_path, keep):
    (tmp_path / NAMED).write_bytes(LORA[:keep])
    with pytest.raises(ValueError, match=rf"{NAMED}: not a whole safetensors file"):
        read_lora(tmp_path)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"x\.ckpt: a pickle, .*never loaded"):
        read_lora(tmp_path / "x.ckpt")
    (tmp_path / "x.safetensors").write_text("<html>not found</html>")
    with pytest.raises(
        ValueError, match=r"x\.safetensors: not a whole safetensors file \(it has 22 bytes"
    ):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "./absent",
        "../a/b",
        "/absent/x",
        "~/absent-lora",
        "absent",
        "a/b.safetensors",
        "a/b/c",
        "a/",
        "absent.safetensors",
    ],
)
def test_what_looks_like_a_path_is_no_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        find_lora, "_from_hub", lambda *asked: pytest.fail(f"asked the Hub for {asked}")
    )
    with pytest.raises(ValueError, match=rf"^{name}: no such LoRA file or folder$"):
        read_lora(name)


def test_one_of_a_folders_files_is_chosen_or_all_are_named(tmp_path):
    (tmp_path / "readme.md").write_text("{}")
    with pytest.raises(ValueError, match="found 0 safetensors files"):
        read_lora(tmp_path)
    for name in ("a.safetensors", "b.sft"):
        (tmp_path / name).write_bytes(LORA)
    with pytest.raises(
        ValueError,
        match=r"found 2 files that may be it: a\.safetensors, b\.sft\. To choose one, give",
    ):
        read_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(LORA)
    assert read_lora(tmp_path).path.name == "adapter_model.safetensors"
    (tmp_path / NAMED).write_bytes(LORA)
    with pytest.raises(
        ValueError, match=rf"found 2 files that may be it: {NAMED}, adapter_model\.safetensors"
    ):
        read_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert read_lora(tmp_path).path.name == NAMED


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of one repository, owner/name, which `find_lora` asks, with a cache of its own."""
    hub = FakeHub("owner/name", {})
    with serving(hub):
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        cache = tmp_path / "cache"
        for name in ("snapshot_download", "hf_hub_download"):
            asking = partial(
                getattr(huggingface_hub, name), endpoint=hub.url, cache_dir=cache, token=False
            )
            monkeypatch.setattr(find_lora, name, asking)
        looking = partial(huggingface_hub.try_to_load_from_cache, cache_dir=cache)
        monkeypatch.setattr(find_lora, "try_to_load_from_cache", looking)
        monkeypatch.chdir(tmp_path)
        yield hub
    huggingface_hub.close_session()


def test_a_repository_is_downloaded_once(hub):
    # neither the pickle nor the second LoRA is fetched
    hub.files = {
        NAMED: LORA,
        "pytorch_lora_weights.bin": b"x",
        "steps/500.safetensors": b"x",
        "README.md": b"x",
    }
    lora = read_lora("owner/name")
    assert lora.targets == [TO_Q]
    assert lora.path.read_bytes() == LORA
    assert lora.notes == (
        f"owner/name: {NAMED} of the Hugging Face Hub's repository, commit {COMMIT[:8]}",
    )
    fetched = {
        path.rpartition("/")[2]
        for method, path in hub.requests
        if method == "GET" and "/resolve/" in path
    }
    assert fetched == {NAMED}
    hub.requests.clear()
    again = read_lora("owner/name")
    assert (again.path, again.notes) == (lora.path, lora.notes)
    assert hub.requests == []


def test_peft_settings_of_a_repository_hold(hub):
    hub.files = {
        "adapter_model.safetensors": LORA,
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}).encode(),
    }
    for _ in range(2):
        assert read_lora("owner/name").alphas == {TO_Q: 32}


def test_weights_that_another_program_cached_do_not_hide_the_settings(hub):
    hub.files = {
        "adapter_model.safetensors": LORA,
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 32}).encode(),
    }
    find_lora.hf_hub_download("owner/name", "adapter_model.safetensors")
    assert read_lora("owner/name").alphas == {TO_Q: 32}


def test_one_of_a_repositorys_files_is_chosen_or_all_are_named(hub):
    other = save({key: 2 * tensor for key, tensor in PAIR.items()})
    hub.files = {"a.safetensors": LORA, "steps/500.safetensors": other}
    # the only one at the root
    assert read_lora("owner/name").path.read_bytes() == LORA
    assert read_lora("owner/name/steps/500.safetensors").path.read_bytes() == other
    hub.requests.clear()
    assert read_lora("owner/name/steps/500.safetensors").path.read_bytes() == other
    assert hub.requests == []
    hub.files["b.safetensors"] = other
    with pytest.raises(
        ValueError,
        match=r"owner/name: .*found 2 files .*a\.safetensors, b\.saf.*give owner/name/<file>",
    ):
        read_lora("owner/name")
    with pytest.raises(
        ValueError,
        match=r"owner/name: holds no c\.safetensors; its safetensors files: a\.safetensors, b",
    ):
        read_lora("owner/name/c.safetensors")
    hub.files = {"x.bin": b"x"}
    with pytest.raises(
        ValueError, match=r"owner/name: expected one LoRA.*found 0 safetensors files"
    ):
        read_lora("owner/name")


@pytest.mark.parametrize("name", ["owner/absent", "owner/absent/x.safetensors", "a--b/c"])
def test_a_repository_that_the_hub_does_not_give(hub, name):
    with pytest.raises(
        ValueError,
        match=rf"^{name}: not a file or folder here, and the Hugging Face Hub gave no LoRA",
    ):
        read_lora(name)


def test_without_a_connection_the_cache_serves_and_an_unknown_name_is_refused(hub, monkeypatch):
    hub.files = {"a.safetensors": LORA}
    lora = read_lora("owner/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert read_lora("owner/name").path == lora.path
    with pytest.raises(
        ValueError,
        match=r"^owner/other: not a file or folder here, and the Hugging Face Hub gave no LoRA",
    ):
        read_lora("owner/other")


def test_a_folder_here_comes_before_a_repository_of_its_name(hub, tmp_path):
    hub.files = {NAMED: b"x"}
    (tmp_path / "owner/name").mkdir(parents=True)
    save_file(PAIR, tmp_path / "owner/name" / NAMED)
    assert read_lora("owner/name").targets == [TO_Q]
    assert hub.requests == []
