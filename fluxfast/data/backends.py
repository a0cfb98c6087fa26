"""Bringing a dataset's images to its folder, from wherever they lie."""

from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from fluxfast.config.backends import Bucket, CsvFile, HuggingFaceDataset, RemoteFolder
from fluxfast.config.datasets import ImageDataset
from fluxfast.config.generators import Generated
from fluxfast.data.contents import Contents
from fluxfast.data.csv_images import csv_contents
from fluxfast.data.generators import generate
from fluxfast.data.hub_dataset import hub_contents
from fluxfast.data.images import discover
from fluxfast.data.parquet_table import table_contents
from fluxfast.data.remote_folder import remote_contents
from fluxfast.files import mark_used


def bring(dataset: ImageDataset, workers: int, bars: Progress) -> Contents:
    """Bring what is missing, and say what tables tell of the images.

    A dataset without an origin or a table costs nothing. Raises ValueError naming the dataset and
    what can't be read.
    """
    contents = _brought(dataset, workers, bars)
    if dataset.origin is not None:
        mark_used(dataset.instance_data_dir)
    if "parquet" not in (dataset.metadata_backend, dataset.caption_strategy):
        return contents
    root = Path(dataset.instance_data_dir)
    files = contents.files
    if files is None:
        files = frozenset(path.relative_to(root).as_posix() for path in discover(root).images)
    table = table_contents(dataset, sorted(files))
    return replace(
        table,
        files=contents.files if table.files is None else table.files,
        skipped=contents.skipped,
        notes=contents.notes + table.notes,
    )


def _brought(dataset: ImageDataset, workers: int, bars: Progress) -> Contents:
    if isinstance(dataset.origin, CsvFile):
        return csv_contents(dataset, workers, bars)
    if isinstance(dataset.origin, Bucket | RemoteFolder):
        return remote_contents(dataset, workers, bars)
    if isinstance(dataset.origin, Generated):
        return generate(dataset, workers, bars)
    if isinstance(dataset.origin, HuggingFaceDataset):
        return hub_contents(dataset, bars)
    return Contents()
