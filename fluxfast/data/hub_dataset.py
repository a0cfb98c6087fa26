"""Images of a dataset of the Hugging Face Hub, or of local files that `datasets` reads.

The `datasets` library runs no code of a dataset.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import Progress

from fluxfast.config.backends import CompositeImage, HuggingFaceDataset, QualityFilter
from fluxfast.config.datasets import ImageDataset
from fluxfast.data.contents import Contents
from fluxfast.data.images import UnreadableImage, load_image
from fluxfast.data.mirror import FetchError, Mirror, Wanted
from fluxfast.data.tables import check_columns, row_captions

# readers of the library for single files
_FILE_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def hub_contents(dataset: ImageDataset, bars: Progress) -> Contents:
    """Bring the images of the dataset to its folder, named by their rows.

    Raises ValueError if it can't be loaded, or lacks a column.
    """
    origin = dataset.origin
    assert isinstance(origin, HuggingFaceDataset)
    where = f'dataset "{dataset.id}": {origin.dataset_name}'
    rows = _load(origin, where)
    with_captions = dataset.caption_strategy == "huggingface"
    _check(origin, rows.column_names, where, with_captions=with_captions)
    stamp = _stamp(origin, rows)
    # images are only read where they are missing
    others = [name for name in rows.column_names if name != origin.image_column]
    facts = rows.select_columns(others) if others else ({} for _ in range(len(rows)))
    captions, wanted = {}, []
    for index, row in enumerate(facts):
        if origin.filter_func and not _passes(row, origin.filter_func, origin.quality_column):
            continue
        # decoders go by content
        name = f"{index:08d}.png"
        captions[name] = row_captions(
            row,
            origin.caption_column,
            origin.fallback_caption_column,
            origin.description_column,
        )
        fetch = functools.partial(_write, rows, index, origin)
        wanted.append(Wanted(name, stamp, fetch))
    mirror = Mirror(Path(dataset.instance_data_dir))
    # the library's tables are not made for several threads
    skipped = mirror.bring(wanted, id=dataset.id, workers=1, bars=bars)
    files = frozenset(each.name for each in wanted) - {each.file for each in skipped}
    notes = () if len(wanted) == len(rows) else (f"{len(wanted)} of {len(rows)} rows are used",)
    return Contents(files, captions if with_captions else None, skipped=tuple(skipped), notes=notes)


def _load(origin: HuggingFaceDataset, where: str) -> Any:
    import datasets

    path = Path(origin.dataset_name).expanduser()
    token = origin.auth_token.get_secret_value() if origin.auth_token else None
    try:
        if path.is_file():
            if path.suffix not in _FILE_READERS:
                raise ValueError(f"a file must end in one of {', '.join(_FILE_READERS)}")
            rows = datasets.load_dataset(
                _FILE_READERS[path.suffix], data_files=str(path), split="train"
            )
        else:
            rows = datasets.load_dataset(
                str(path) if path.is_dir() else origin.dataset_name,
                origin.dataset_config,
                split=origin.split,
                revision=None if path.is_dir() else origin.revision,
                token=token,
            )
        if origin.image_column in rows.column_names and not isinstance(
            rows.features[origin.image_column], datasets.Value
        ):
            rows = rows.cast_column(origin.image_column, datasets.Image(decode=False))
    # the library raises errors of the Hub, of Arrow and of each reader
    except Exception as error:
        text = str(error) or type(error).__name__
        text = text.replace(token, "***") if token else text
        raise ValueError(f"{where}: can't be loaded: {text}") from error
    return rows


def _check(
    origin: HuggingFaceDataset, known: list[str], where: str, *, with_captions: bool
) -> None:
    wanted: dict[str, Any] = {"image_column": origin.image_column}
    if with_captions:
        for key in ("caption_column", "fallback_caption_column", "description_column"):
            wanted[key] = getattr(origin, key)
    filters = origin.filter_func
    if filters:
        wanted |= {
            "filter_func.collection": "collection" if filters.collection else None,
            "quality_column": origin.quality_column if filters.quality_thresholds else None,
            "filter_func.min_width": "width" if filters.min_width else None,
            "filter_func.min_height": "height" if filters.min_height else None,
        }
    check_columns(wanted, known, where)


def _passes(row: Mapping[str, Any], filters: QualityFilter, quality_column: str) -> bool:
    """Whether a row is used; a row that lacks a number which is compared is not."""
    allowed = filters.collection
    allowed = (allowed,) if isinstance(allowed, str) else allowed
    if allowed and row["collection"] not in allowed:
        return False
    compared: list[tuple[Any, float | None]] = [
        (row.get("width"), filters.min_width),
        (row.get("height"), filters.min_height),
    ]
    qualities = row.get(quality_column) or {}
    compared += [(qualities.get(name), least) for name, least in filters.quality_thresholds.items()]
    return all(not least or (value is not None and value >= least) for value, least in compared)


def _stamp(origin: HuggingFaceDataset, rows: Any) -> str:
    """What changes with the data or with what is cut out of it."""
    cut = origin.composite_image_config
    told = [rows._fingerprint, origin.image_column, cut and cut.model_dump()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _write(rows: Any, index: int, origin: HuggingFaceDataset, target: BinaryIO) -> None:
    try:
        cell = rows[index][origin.image_column]
    except Exception as error:
        raise FetchError(f"its row can't be read: {error}") from error
    target.write(_content(cell, origin))
    if origin.composite_image_config is not None:
        _cut(target, origin.composite_image_config)


def _content(cell: Any, origin: HuggingFaceDataset) -> bytes:
    """The bytes of an image: in its cell, or in the file that the cell names."""
    local = Path(origin.dataset_name).expanduser()
    if isinstance(cell, str) and cell:
        cell = {"path": (local.parent if local.is_file() else local) / cell}
    if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
        raise FetchError("its row has no image")
    if cell.get("bytes"):
        content: bytes = cell["bytes"]
        return content
    path = Path(cell["path"])
    # a table from elsewhere must not choose among this machine's files
    if not local.exists() and not any(path.resolve().is_relative_to(each) for each in _downloads()):
        raise FetchError("its row names a file, which only a local dataset may")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FetchError(f"can't be read: {error.strerror}") from error


def _downloads() -> list[Path]:
    """The folders that the library downloads a dataset's files to."""
    import datasets
    import huggingface_hub.constants

    folders = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    return [Path(folder).resolve() for folder in folders]


def _cut(stream: BinaryIO, config: CompositeImage) -> None:
    """Replace the image in `stream` by one of the parts that it holds side by side."""
    stream.flush()
    try:
        image = load_image(stream.name)
    except UnreadableImage as error:
        raise FetchError(error.reason) from error
    edges = [image.width * (config.select_index + i) // config.image_count for i in (0, 1)]
    if edges[0] == edges[1]:
        raise FetchError(f"is too narrow for {config.image_count} parts")
    stream.seek(0)
    stream.truncate()
    image.crop((edges[0], 0, edges[1], image.height)).save(stream, format="PNG")
