"""What a base's name leads to."""

import os

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from fluxfast.checkpoint import locate
from fluxfast.checkpoint.reader import CheckpointError


def refused(name, message):
    with pytest.raises(CheckpointError, match=message):
        locate.local_path(name)


@pytest.mark.parametrize(
    "name", ["flux1-dev", "flux1-dev.sft", "models/flux1-dev", "models/flux.v1/dev.bin"]
)
def test_what_is_here_comes_first(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert locate.local_path(name).samefile(path) and locate.local_path(path) == path
    path.unlink()
    path.mkdir()
    assert locate.local_path(name).samefile(path)


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flux1-dev.sft").touch()
    assert locate.local_path("~/flux1-dev.sft") == tmp_path / "flux1-dev.sft"


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "someone/flux_lite.v2"])
def test_repositories(name):
    assert locate.local_path(name) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.sft", r"absent\.sft: no such file"),
        ("models/flux1-dev.safetensors", "no such file"),
        ("someone/flux1-dev-Q8_0.gguf", "no such file"),
        ("/absent/folder", "no such folder or file"),
        ("./absent", "no such folder or file"),
        ("../someone/flux", "no such folder or file"),
        ("FLUX.1-dev", r"not a repository of the hub \(owner/name\) either"),
        ("a/b/c", "not a repository"),
        ("C:\\models\\flux", "not a repository"),
        ("x" * 5000, "can't be looked at"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    refused(name, message)


@pytest.mark.skipif(os.name != "posix", reason="no such things")
def test_links_and_pipes(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone.safetensors")
    refused(tmp_path / "link", r"link: a link to .*gone\.safetensors, which is not there")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a file nor a folder")


def test_the_hub_has_none(monkeypatch):
    def gives_none(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(locate, "snapshot_download", gives_none)
    with pytest.raises(
        CheckpointError,
        match="someone/else: no such folder here, and the hub gave none by that name: offline",
    ):
        locate.download("someone/else", [], {})


def test_folders_without_a_model(tmp_path):
    for name in ("flux1-dev.safetensors", "flux1-dev-Q8_0.gguf", "notes.txt"):
        (tmp_path / name).touch()
    hint = r"name the file itself: flux1-dev-Q8_0\.gguf, flux1-dev\.safetensors$"
    with pytest.raises(CheckpointError, match=rf"config\.json: no such file; .*{hint}"):
        locate.model_folder(tmp_path, (None, "transformer"))
    (tmp_path / "flux1-dev.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"neither .* there; it holds diffusion_pytorch_model\.bin, .*a pickle .*never",
    ):
        locate.weight_files(tmp_path, None)
