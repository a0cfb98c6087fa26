"""The Parquet table of a folder's images: their captions and sizes."""

from pathlib import PurePosixPath
from typing import Any

from fluxfast.config.backends import ParquetTable
from fluxfast.config.datasets import ImageDataset
from fluxfast.data.contents import Contents
from fluxfast.data.image_kinds import readable
from fluxfast.data.mirror import some
from fluxfast.data.tables import check_columns, row_captions

_ROWS = 10_000


def table_contents(dataset: ImageDataset, files: list[str]) -> Contents:
    """What the table says of `files`, the images in the dataset's folder.

    With `metadata_backend` parquet only images that have a row belong to the dataset. Raises
    ValueError if the table can't be read or lacks a column.
    """
    table = dataset.parquet
    assert table is not None
    where = f'dataset "{dataset.id}": {table.path}'
    by_name: dict[str, list[str]] = {}
    for file in files:
        by_name.setdefault(_identifier(file, table), []).append(file)
    captions: dict[str, list[str]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    absent, repeated, seen = [], [], set()
    for row in _rows(table, where, with_captions=dataset.caption_strategy == "parquet"):
        name = _identifier(str(row[table.filename_column]), table)
        if name in seen:
            repeated.append(name)
            continue
        seen.add(name)
        if name not in by_name:
            absent.append(name)
        for file in by_name.get(name, ()):
            captions[file] = row_captions(row, table.caption_column, table.fallback_caption_column)
            size = tuple(
                row.get(column or "") for column in (table.width_column, table.height_column)
            )
            # null and NaN say nothing
            if all(isinstance(side, int | float) and side > 0 for side in size):
                sizes[file] = (int(size[0]), int(size[1]))
    notes = []
    if absent:
        notes.append(f"{len(absent)} rows of {table.path} have no image ({some(absent)})")
    if repeated:
        notes.append(
            f"{len(repeated)} rows of {table.path} repeat a name, and the first is used "
            f"({some(repeated)})"
        )
    return Contents(
        frozenset(captions) if dataset.metadata_backend == "parquet" else None,
        captions if dataset.caption_strategy == "parquet" else None,
        sizes,
        notes=tuple(notes),
    )


def _identifier(name: str, table: ParquetTable) -> str:
    """What an image and its row have in common."""
    path = PurePosixPath(name)
    if table.identifier_includes_extension or path.suffix.lower() not in readable():
        return path.as_posix()
    return path.with_suffix("").as_posix()


def _rows(table: ParquetTable, where: str, *, with_captions: bool) -> Any:
    import pyarrow
    import pyarrow.parquet

    wanted: dict[str, Any] = {
        "parquet.filename_column": table.filename_column,
        "parquet.width_column": table.width_column,
        "parquet.height_column": table.height_column,
    }
    if with_captions:
        wanted["parquet.caption_column"] = table.caption_column
        wanted["parquet.fallback_caption_column"] = table.fallback_caption_column
    try:
        with pyarrow.parquet.ParquetFile(table.path) as file:
            known = file.schema_arrow.names
            check_columns(wanted, known, where)
            columns = [
                name
                for names in wanted.values()
                if names is not None
                for name in ([names] if isinstance(names, str) else names)
            ]
            for batch in file.iter_batches(_ROWS, columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    if row[table.filename_column] is not None:
                        yield row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{where}: can't be read as a Parquet table: {error}") from error
