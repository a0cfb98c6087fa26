"""Images of a bucket or another remote folder, copied to this machine once.

Stores are read through fsspec; S3 and what speaks its protocol through s3fs.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import SecretStr
from rich.progress import Progress

from fluxfast.config.backends import Bucket, RemoteFolder
from fluxfast.config.datasets import ImageDataset
from fluxfast.data.contents import Contents, Skipped
from fluxfast.data.image_kinds import looks_like_an_image
from fluxfast.data.mirror import MOST_BYTES, FetchError, Mirror, Wanted, colliding, unsafe

# seconds without an answer, and tries of each request
_CONNECT, _SILENCE, _TRIES = 10, 60, 3
# what tells that an object has changed, in the words of several file systems
_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


def remote_contents(dataset: ImageDataset, workers: int, bars: Progress) -> Contents:
    """Bring the images of a remote folder, and their caption files, to the dataset's folder.

    An object whose entity tag and size are known is not read again. Raises ValueError naming the
    dataset and the store if that can't be listed.
    """
    origin = dataset.origin
    assert isinstance(origin, Bucket | RemoteFolder)
    where = f'dataset "{dataset.id}": {_told(origin)}'
    try:
        system, root = _open(origin)
        found: dict[str, Mapping[str, Any]] = system.find(root, detail=True)
    # each file system raises errors of its own
    except Exception as error:
        raise ValueError(f"{where}: can't be read: {_without_secrets(error, origin)}") from error
    objects = dict(_images_and_captions(found, root))
    if not any(looks_like_an_image(Path(name)) for name in objects):
        raise ValueError(f"{where}: holds no images")
    skipped = []
    wanted = []
    folders = colliding(objects)
    for name, (path, facts) in sorted(objects.items()):
        reason = unsafe(name) or (
            "its name is also that of a folder" if name in folders else _too_large(facts)
        )
        if reason:
            skipped.append(Skipped(name, "could not be fetched", reason))
            continue
        stamp = next((str(facts[key]) for key in _STAMPS if facts.get(key)), "")
        fetch = functools.partial(_fetch, system, path, origin)
        wanted.append(Wanted(name, f"{stamp} {facts.get('size')}", fetch))
    mirror = Mirror(Path(dataset.instance_data_dir))
    skipped += mirror.bring(wanted, id=dataset.id, workers=workers, bars=bars)
    failed = {each.file for each in skipped}
    images = (each.name for each in wanted if looks_like_an_image(Path(each.name)))
    return Contents(frozenset(images) - failed, skipped=tuple(skipped))


def _open(origin: Bucket | RemoteFolder) -> tuple[Any, str]:
    """The file system, and the path of the folder in it."""
    import fsspec

    if isinstance(origin, RemoteFolder):
        system, root = fsspec.url_to_fs(origin.url)
        return system, root.rstrip("/")
    import s3fs

    system = s3fs.S3FileSystem(
        key=_plain(origin.aws_access_key_id),
        secret=_plain(origin.aws_secret_access_key),
        token=_plain(origin.aws_session_token),
        endpoint_url=origin.aws_endpoint_url,
        client_kwargs={"region_name": origin.aws_region_name} if origin.aws_region_name else {},
        config_kwargs={
            "connect_timeout": _CONNECT,
            "read_timeout": _SILENCE,
            "retries": {"max_attempts": _TRIES, "mode": "standard"},
        },
        # a listing of an earlier survey is not of now
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    system.retries = _TRIES
    return system, f"{origin.aws_bucket_name}/{origin.aws_data_prefix.strip('/')}".rstrip("/")


def _images_and_captions(
    found: Mapping[str, Mapping[str, Any]], root: str
) -> Iterator[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Each object's name below the root, with its path and its facts."""
    for path, facts in found.items():
        name = path[len(root) :].lstrip("/")
        parts = name.split("/")
        # a hidden object is no data, but one that climbs out of the folder is told
        hidden = ".." not in parts and any(part.startswith(".") for part in parts)
        is_data = looks_like_an_image(Path(name)) or name.endswith(".txt")
        if facts.get("type") == "file" and is_data and not hidden:
            yield name, (path, facts)


def _fetch(system: Any, path: str, origin: Bucket | RemoteFolder, target: BinaryIO) -> None:
    try:
        # one request, as an opened file would make several
        content = system.cat_file(path)
    except Exception as error:
        raise FetchError(f"can't be read: {_without_secrets(error, origin)}") from error
    target.write(content)


def _too_large(facts: Mapping[str, Any]) -> str | None:
    large = (facts.get("size") or 0) > MOST_BYTES
    return f"is larger than {MOST_BYTES >> 20} MiB" if large else None


def _told(origin: Bucket | RemoteFolder) -> str:
    if isinstance(origin, RemoteFolder):
        return origin.url
    at = f" at {origin.aws_endpoint_url}" if origin.aws_endpoint_url else ""
    return f'bucket "{origin.aws_bucket_name}"{at}'


def _without_secrets(error: Exception, origin: Bucket | RemoteFolder) -> str:
    """The error's text; a store may repeat the key that it refuses."""
    text = str(error) or type(error).__name__
    for value in dict(origin).values():
        if isinstance(value, SecretStr) and value.get_secret_value():
            text = text.replace(value.get_secret_value(), "***")
    return text


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
