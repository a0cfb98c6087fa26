"""Where a dataset's files lie when they don't lie in a local folder, and the tables that name them.

The keys are SimpleTuner's. They are flat in an entry; here the keys of one `type` make one object,
the dataset's `origin`. Whatever the origin, the images are brought to `instance_data_dir`, a folder
of this machine, before they are looked at.
"""

import importlib.util
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator

from fluxfast.config.cache_folders import images_folder
from fluxfast.config.generators import Generated
from fluxfast.config.settings import Settings, did_you_mean, is_default, problem_text, shown


class ParquetTable(Settings):
    """A Parquet file with a row for each image of a folder; needs `fluxfast[parquet]`.

    It says which images there are (`metadata_backend`) and what they show (`caption_strategy`).
    """

    path: Path
    """The table."""
    filename_column: str = "id"
    """Column of the images' names: paths below the folder."""
    caption_column: str | tuple[str, ...] = "caption"
    """Column of captions, or several; a list in it is several captions."""
    fallback_caption_column: str | None = None
    """Column whose captions stand in for empty ones."""
    width_column: str | None = None
    """Column of widths in pixels, which are compared with the images'."""
    height_column: str | None = None
    """Column of heights in pixels, which are compared with the images'."""
    identifier_includes_extension: bool = False
    """The names end in the files' extension."""


class Bucket(Settings):
    """A bucket of S3, or of a store that speaks its protocol."""

    aws_bucket_name: str = Field(min_length=1)
    """The bucket."""
    aws_data_prefix: str = ""
    """Folder in the bucket (empty: all of it)."""
    aws_endpoint_url: str | None = None
    """Address of a store that isn't Amazon's."""
    aws_region_name: str | None = None
    """Region (unset: the environment's)."""
    aws_access_key_id: SecretStr | None = Field(None, exclude=True)
    """Key (unset: the environment's, or that of the AWS configuration)."""
    aws_secret_access_key: SecretStr | None = Field(None, exclude=True)
    """The key's secret."""
    aws_session_token: SecretStr | None = Field(None, exclude=True)
    """Token of a temporary key."""


class RemoteFolder(Settings):
    """A folder of any store that fsspec has a file system for, by its address."""

    url: str
    """Address, such as gs://bucket/prefix."""


class CsvFile(Settings):
    """A table of images in the web, or of files."""

    csv_file: Path
    """The table, with the columns' names in its first line."""
    csv_url_column: str = "url"
    """Column of http(s) addresses, or of paths that start at the table's folder."""
    csv_caption_column: str = "caption"
    """Column of captions."""


class QualityFilter(Settings):
    """Which rows of a Hugging Face dataset are used."""

    collection: str | tuple[str, ...] = ()
    """Values of the column `collection` to use (empty: all)."""
    quality_thresholds: dict[str, float] = Field(default_factory=dict)
    """Least values of the numbers in `quality_column`."""
    min_width: int | None = Field(None, ge=0)
    """Least value of the column `width`, in pixels."""
    min_height: int | None = Field(None, ge=0)
    """Least value of the column `height`, in pixels."""


class CompositeImage(Settings):
    """Images that hold several of one width side by side, of which one is used."""

    enabled: bool = False
    """Cut them."""
    image_count: int = Field(1, ge=1)
    """Parts side by side."""
    select_index: int = Field(0, ge=0)
    """The part to use, counted from 0 at the left."""


class HuggingFaceDataset(Settings):
    """A dataset of the Hugging Face Hub, or a local folder or file that `datasets` reads."""

    dataset_name: str = Field(min_length=1)
    """Repository (owner/name), local folder, or local Parquet, JSON or CSV file."""
    dataset_config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split to use."""
    revision: str | None = None
    """Revision of the repository."""
    auth_token: SecretStr | None = Field(None, exclude=True)
    """Access token (unset: that of the login)."""
    image_column: str = "image"
    """Column of images."""
    caption_column: str | tuple[str, ...] = "caption"
    """Column of captions, or several; a list in it is several captions."""
    fallback_caption_column: str | None = None
    """Column whose captions stand in for empty ones."""
    description_column: str | None = None
    """Column whose captions stand in where those are empty, too."""
    quality_column: str = "quality_assessment"
    """Column of objects of numbers, for `quality_thresholds`."""
    filter_func: QualityFilter | None = None
    """Which rows are used."""
    composite_image_config: CompositeImage | None = None
    """Which part of each image is used."""

    @field_validator("composite_image_config")
    @classmethod
    def _within(cls, value: CompositeImage | None) -> CompositeImage | None:
        if value is not None and value.enabled and value.select_index >= value.image_count:
            raise ValueError(
                f'"select_index" ({value.select_index}) must be less than "image_count" '
                f"({value.image_count})"
            )
        return value if value is not None and value.enabled else None


Origin: TypeAlias = Bucket | RemoteFolder | CsvFile | HuggingFaceDataset | Generated
Type = Literal["local", "aws", "csv", "huggingface"]
ORIGINS: dict[str, type[Bucket] | type[CsvFile] | type[HuggingFaceDataset]] = {
    "aws": Bucket,
    "csv": CsvFile,
    "huggingface": HuggingFaceDataset,
}
# what reads the images of a type, and tables: (package, extra that brings it)
_PACKAGES = {
    "aws": ("s3fs", "s3"),
    "huggingface": ("datasets", "datasets"),
    "parquet": ("pyarrow", "parquet"),
}
# keys of origins that say nothing of an image's content, or may be a path
_NOT_OF_IMAGES = {
    "aws_region_name", "csv_caption_column", "caption_column", "fallback_caption_column",
    "description_column", "quality_column", "filter_func",
}  # fmt: skip
_MAYBE_LOCAL = ("csv_file", "dataset_name")
# keys that SimpleTuner's forms write with the types that they don't belong to
_HARMLESS = {"split": "train", "image_column": "image"}


def take_origin(
    values: dict[str, Any], cache_dir: Path, where: str, problems: list[str], notes: list[str]
) -> None:
    """Replace the keys of an image entry's `type` by its `origin` and its `instance_data_dir`.

    Its problems and notes are added to the two lists.
    """
    kind = values.get("type", "local")
    if "origin" in values:
        problems.append(f'{where}: "origin" is not a key of a dataset')
        del values["origin"]
    if kind == "huggingface":
        _flatten(values, where, problems)
        if not is_default(values.pop("streaming", False), False):
            problems.append(
                f'{where}: "streaming" is not implemented yet: remove it, and the dataset is '
                "downloaded once"
            )
    model = ORIGINS.get(kind) if isinstance(kind, str) else None
    own = {name: values.pop(name) for name in list(values) if name in _fields(model)}
    _refuse_keys_of_others(values, kind, where, problems)
    if model is None:
        folder = values.get("instance_data_dir")
        if kind == "local" and isinstance(folder, str) and "://" in folder:
            values["origin"] = _remote_folder(folder, where, problems)
            values["instance_data_dir"] = _copies(values, cache_dir)
        return
    problems += _missing_package(kind, f'"type" is "{kind}"', where)
    values["origin"] = _built(model, own, where, problems)
    if values.pop("instance_data_dir", None):
        notes.append(
            f'{where}: "instance_data_dir" has no effect with "type" "{kind}": the images are '
            f"brought to a folder in the cache"
        )
    values["instance_data_dir"] = values.pop("csv_cache_dir", "") or _copies(values, cache_dir)
    if kind == "aws" and values.get("cache_dir_vae"):
        notes.append(f'{where}: "cache_dir_vae" is a folder of this machine, not of the bucket')


def package_problems(values: dict[str, Any], where: str) -> list[str]:
    """What an entry's tables need that is not installed."""
    asking = [
        name for name in ("metadata_backend", "caption_strategy") if values.get(name) == "parquet"
    ]
    return _missing_package("parquet", f'"{asking[0]}" is "parquet"', where) if asking else []


def _copies(values: dict[str, Any], cache_dir: Path) -> str:
    """The folder of an entry's images, by what its origin says of them."""
    origin = values["origin"]
    told = origin.model_dump(mode="json", exclude=_NOT_OF_IMAGES) if origin else {}
    # a table or a dataset may be a file of this machine, named from the folder that is current
    local = {
        name: str(Path(value).absolute())
        for name, value in told.items()
        if isinstance(value, str) and name in _MAYBE_LOCAL and Path(value).exists()
    }
    return str(images_folder(cache_dir, "images", str(values.get("id")), told | local))


def _fields(model: type[Settings] | None) -> tuple[str, ...]:
    return tuple(model.model_fields) if model is not None else ()


def _flatten(values: dict[str, Any], where: str, problems: list[str]) -> None:
    """Put the keys of the object "huggingface" beside it, where they may stand as well."""
    nested = values.pop("huggingface", {})
    if not isinstance(nested, dict):
        problems.append(f'{where}: "huggingface" is {shown(nested)}: expects an object')
        return
    for name, value in nested.items():
        if name in values:
            problems.append(f'{where}: "{name}" stands in the entry and in its "huggingface"')
        elif name not in (*HuggingFaceDataset.model_fields, "streaming", "num_proc"):
            known = HuggingFaceDataset.model_fields
            problems.append(
                f'{where}: "huggingface.{name}" is not a key{did_you_mean(name, known)}'
            )
        elif value is not None:
            values[name] = value


def _refuse_keys_of_others(
    values: dict[str, Any], kind: object, where: str, problems: list[str]
) -> None:
    for other, model in ORIGINS.items():
        cache = ("csv_cache_dir",) if other == "csv" else ()
        for name in (*model.model_fields, *cache):
            if other == kind or name not in values:
                continue
            if is_default(values.pop(name), _HARMLESS.get(name)):
                continue
            problems.append(
                f'{where}: "{name}" is a key of entries whose "type" is "{other}"; remove it here'
            )


def _remote_folder(url: str, where: str, problems: list[str]) -> RemoteFolder | None:
    # it takes half a second to import
    import fsspec

    scheme = url.partition("://")[0]
    what = f'{where}: "instance_data_dir" is {shown(url)}'
    if "@" in url.partition("://")[2].partition("/")[0]:
        problems.append(
            f'{where}: "instance_data_dir" holds a user or a password: give them through the '
            "environment"
        )
        return None
    if scheme in ("file", "local"):
        problems.append(f"{what}: give a path without {scheme}://")
    elif scheme not in fsspec.available_protocols():
        problems.append(f"{what}: no store is known by {scheme}://")
    elif scheme in ("s3", "s3a"):
        problems += _missing_package("aws", what, where, told=True)
    else:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            problems.append(f"{what}: a package that reads it is not installed: {error}")
    return RemoteFolder(url=url)


def _missing_package(key: str, what: str, where: str, *, told: bool = False) -> list[str]:
    if key not in _PACKAGES or importlib.util.find_spec(_PACKAGES[key][0]) is not None:
        return []
    package, extra = _PACKAGES[key]
    return [
        f"{what if told else f'{where}: {what}'}: needs {package}, which is not installed: "
        f'pip install "fluxfast[{extra}]"'
    ]


def _built(
    model: type[Bucket] | type[CsvFile] | type[HuggingFaceDataset],
    fields: dict[str, Any],
    where: str,
    problems: list[str],
) -> Origin | None:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = ".".join(str(part) for part in detail["loc"])
            first = str(detail["loc"][0])
            if detail["type"] == "extra_forbidden":
                known: dict[str, type[Settings]] = {
                    "filter_func": QualityFilter,
                    "composite_image_config": CompositeImage,
                }
                have = known[first].model_fields if first in known else model.model_fields
                text = f"is not a key{did_you_mean(str(detail['loc'][-1]), have)}"
            elif SecretStr in get_args(model.model_fields[first].annotation):
                # its value is not told
                text = "must be text"
            else:
                text = problem_text(detail)
            problems.append(f'{where}: "{name}" {text}')
    return None
