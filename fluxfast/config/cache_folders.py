"""Where caches lie that a config gives no folder: in one for all runs of this user.

Everything in it is named by its content, so runs of the same images or the same base share it, and
others never meet. Earlier versions kept a cache under each `output_dir`, with folders named by the
datasets' ids: what is there goes on being used.
"""

import hashlib
import json
from pathlib import Path

from fluxfast.files import safe_name, user_cache
from fluxfast.text import to_bytes


def default_cache(output_dir: Path) -> Path:
    """The cache of a run that names none: the shared one, or its own of an earlier version."""
    own = output_dir / "cache"
    return own if own.is_dir() else user_cache()


def latents_folder(cache_dir: Path, id: str) -> Path:
    """The folder of a dataset's latents that names none."""
    own = cache_dir / "vae" / safe_name(id)
    return own if own.is_dir() else cache_dir / "vae"


def images_folder(cache_dir: Path, kind: str, id: str, origin: object) -> Path:
    """The folder of a dataset's images that are copied from elsewhere, or made, by its origin.

    kind: a folder of the cache. origin: JSON-able; of the same id and origin is the same folder.
    """
    name = safe_name(id)
    own = cache_dir / kind / name
    digest = hashlib.sha256(to_bytes(json.dumps(origin, sort_keys=True))).hexdigest()
    return own if own.is_dir() else cache_dir / kind / f"{name}-{digest[:8]}"
