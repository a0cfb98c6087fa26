"""Model folders on this machine: downloaded from the Hugging Face Hub where needed, and told apart
by their contents.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from fluxfast.data.cache import TensorCache, fingerprint

# (folder or Hub repository, folder inside it or None for its root, Hub revision or None); the
# config's `Source` is one
ModelSource = tuple[str, str | None, str | None]

_HASHED_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
_ROOT_WEIGHTS = ("config.json", "model*.safetensors*", "diffusion_pytorch_model*.safetensors*")


def local_folder(source: ModelSource, *, download: bool = True) -> Path:
    """The folder that holds what `source` names, downloaded if it is not on this machine.

    A repository that has been downloaded before is used without asking the network. Where the
    subfolder doesn't exist but the root itself holds a model, the root is taken: many people
    publish a VAE or T5 like that. Without `download` the network is never asked. Raises ValueError
    if there is neither a folder of that name nor a repository that can be downloaded, or if it
    lacks the subfolder.
    """
    path, subfolder, revision = source
    root = Path(path).expanduser()
    if not root.is_dir():
        if root.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ValueError(
                f"{path}: no such folder, and not a Hugging Face repository's name (owner/name) "
                "either"
            )
        root = _download(path, subfolder, revision, offline=not download)
    folder = _part(root, subfolder)
    if folder is None:
        raise ValueError(
            f"{path}: holds no folder {subfolder!r}, and no model in its root; expected "
            "diffusers' layout"
        )
    return folder


def identity(folder: Path, cache: TensorCache) -> str:
    """A hash of all files in a model's folder that its results depend on.

    These are configs, vocabularies and weights. Weights are read once; from then on `cache` knows
    their hashes as long as nobody writes or replaces the files. Of a Hub download nothing is read,
    because the Hub's cache names files by their hash.
    """
    hashes = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _HASHED_SUFFIXES and path.is_file():
            hashes.append((path.name, _cached_hash(path, cache)))
    return fingerprint(hashes)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_from(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)`; whatever is wrong with the folder is a ValueError.

    The libraries' bars are left out, which count tensors beside our own that count images.
    """
    try:
        with _without_bars():
            return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: can't be loaded as {kind.__name__}: {error}") from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Have diffusers and transformers show no progress bars of their own in the block."""
    # whoever loads a model has imported them
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


def _cached_hash(path: Path, cache: TensorCache) -> str:
    real = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", real.name) and real.parent.name == "blobs":
        return real.name
    stat = real.stat()
    facts = cache.file_facts(str(real), stat)
    if facts is None:
        facts = {"sha256": file_hash(real)}
        cache.remember_files([(str(real), stat, facts)])
    return facts["sha256"]


def _part(root: Path, subfolder: str | None) -> Path | None:
    folder = root / subfolder if subfolder else root
    if folder.is_dir() and any(folder.iterdir()):
        return folder
    return root if (root / "config.json").is_file() else None


def _download(
    repository: str, subfolder: str | None, revision: str | None, *, offline: bool
) -> Path:
    patterns = [f"{subfolder}/*", *_ROOT_WEIGHTS] if subfolder else ["*"]
    pickles = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx"]
    fetch = functools.partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=pickles,
    )
    try:
        with contextlib.suppress(FileNotFoundError):
            root = Path(fetch(local_files_only=True))
            if _is_complete(_part(root, subfolder)):
                return root
        return Path(fetch(local_files_only=offline))
    except (HfHubHTTPError, OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"{repository}{at}: no folder of that name here, and it can't be downloaded from "
            f"the Hugging Face Hub: {error}\n"
            "Check the name; for a gated model accept its licence on its page and log in with "
            "`hf auth login`."
        ) from error


def _is_complete(folder: Path | None) -> bool:
    if folder is None:
        return False
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if not all((folder / shard).exists() for shard in shards):
            return False
    return True
