"""`fluxfast-train cache`: what it lists, what it removes, and what it asks before."""

import io
import sys
import time

import pytest

from fluxfast.cli.main import main
from fluxfast.data.cache import TensorCache

DAY = 86400


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache with latents of two datasets, one of which was not used for long."""
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("COLUMNS", "80")
    root = tmp_path / "user" / "fluxfast"
    latents = TensorCache(root / "vae")
    for owner, days in (("cats (/data/[cats])", 0), ("dogs (/data/dogs)", 40)):
        entries = [(f"{owner}{i}", "f") for i in range(3)]
        latents.put_many((*entry, {"latents": torch.zeros(64)}) for entry in entries)
        with monkeypatch.context() as patched:
            then = time.time() - days * DAY
            patched.setattr("fluxfast.data.cache_index.time.time", lambda then=then: then)
            latents.note_use(entries, owner)
    latents.close()
    (root / "doctor").mkdir()
    (root / "doctor" / "a.json").write_text("{}")
    return root


def test_a_row_for_each_owner(cache, capsys):
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 80
    (cats,) = (line for line in out.split("\n") if "cats" in line)
    (dogs,) = (line for line in out.split("\n") if "dogs" in line)
    assert cats.startswith("latents") and "(/data/[cats])" in cats and cats.endswith("today")
    assert " 3 " in cats and dogs.endswith("40 days ago")
    assert "outcomes of checks" in out and str(cache) in out.replace("\n", "")


def test_what_the_last_start_did_not_need_is_told(cache, capsys):
    latents = TensorCache(cache / "vae")
    latents.note_use([("cats (/data/[cats])0", "f")], "cats (/data/[cats])")
    main(["cache"])
    size = 2 * next((cache / "vae").glob("*.safetensors")).stat().st_size
    assert f"{size} bytes of it was not needed" in capsys.readouterr().out


def test_only_what_is_old_enough_goes(cache, capsys):
    assert main(["cache", "--older-than", "30", "--yes"]) == 0
    assert "removed" in capsys.readouterr().out
    main(["cache"])
    out = capsys.readouterr().out
    assert "cats" in out and "dogs" not in out and "doctor" in out
    assert len(list((cache / "vae").glob("*.safetensors"))) == 3
    # the index has forgotten them as well, so that nobody is told that they are gone
    assert len(TensorCache(cache / "vae")._index.entries()) == 3
    assert main(["cache", "--older-than", "30", "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_a_kind_goes_alone(cache, capsys):
    assert main(["cache", "--clear", "latents", "--yes"]) == 0
    assert (
        not list((cache / "vae").glob("*.safetensors")) and (cache / "doctor" / "a.json").exists()
    )
    assert main(["cache", "--clear", "--yes"]) == 0
    assert not (cache / "doctor").exists()
    capsys.readouterr()
    assert main(["cache"]) == 0
    assert "nothing is cached" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("", False), ("no", False)])
def test_it_asks_in_a_terminal(cache, monkeypatch, answer, removed):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer + "\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["cache", "--clear"]) == (0 if removed else 1)
    assert bool(list((cache / "vae").glob("*.safetensors"))) is not removed


def test_elsewhere_nothing_goes_unasked(cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["cache", "--clear"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert len(list((cache / "vae").glob("*.safetensors"))) == 6


def test_an_unknown_kind(cache, capsys):
    assert main(["cache", "--clear", "latent"]) == 2
    assert "there is no kind latent; kinds are bases, latents" in capsys.readouterr().err


def test_the_cache_of_a_config(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "lora", "model_family": "flux", "data_backend_config": "d.json", '
        '"cache_dir": "own"}'
    )
    assert main(["cache", "config.json"]) == 0
    assert "own: nothing is cached" in " ".join(capsys.readouterr().out.split())
    assert main(["cache", "missing.json"]) == 2
