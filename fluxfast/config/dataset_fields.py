"""The entries of the dataloader's config: image datasets and the text cache, each valid by itself.

Fields have the names and defaults of the JSON keys. Sizes are in the unit of resolution_type.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from fluxfast.config.backends import Origin, ParquetTable, Type
from fluxfast.config.caption_filter import caption_filter
from fluxfast.config.caption_shuffle import CaptionShuffle
from fluxfast.config.generators import Generated, Generators
from fluxfast.config.settings import Settings, read_json, shown
from fluxfast.text import lines, printable

ResolutionType = Literal["pixel", "area", "pixel_area"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"]


@dataclass(frozen=True)
class DatasetDefaults:
    """The run's values for what a dataset doesn't say."""

    resolution: float = 1024.0
    resolution_type: ResolutionType = "pixel_area"
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    max_upscale_threshold: float | None = None
    vae_cache_ondemand: bool = False
    vae_cache_disable: bool = False
    caption_strategy: CaptionStrategy = "filename"
    instance_prompt: str | None = None
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    output_dir: Path = Path("simpletuner-results")
    cache_dir: Path = Path("cache")
    write_batch_size: int = 128
    text_encoder_batch_size: int = 1


def _read_filters(value: Any) -> Any:
    """A `caption_filter_list` as a list.

    It is given as one, as a JSON file that holds one, or as a text file with an entry on each line.
    """
    if not isinstance(value, str):
        return value
    if not value:
        return ()
    path = Path(value)
    if path.suffix == ".json":
        return read_json(path)
    try:
        found = lines(path.read_bytes().decode("utf-8-sig"))
    # a name with a zero character and text that isn't UTF-8 are ValueErrors
    except (OSError, ValueError) as error:
        raise ValueError(f"can't be read as a text file: {error}") from None
    return tuple(line for line in found if line.strip())


def _check_filters(value: tuple[str, ...]) -> tuple[str, ...]:
    caption_filter(value)
    return value


FilterList = Annotated[
    tuple[str, ...], BeforeValidator(_read_filters), AfterValidator(_check_filters)
]


class _Entry(Settings):
    id: str = Field(min_length=1)
    """Name of the entry, different from every other's; caches and sampler states belong to it."""
    type: Literal["local"] = "local"
    """Where the files lie."""

    @field_validator("id")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if printable(value) != value:
            raise ValueError(
                "holds a line break or another character that can't be printed; remove it"
            )
        return value


class TextEmbeds(_Entry):
    """Where the text encoders' outputs are cached."""

    dataset_type: Literal["text_embeds"]
    """Kind of the entry."""
    default: bool = False
    """The entry of datasets that name none."""
    cache_dir: Path
    """Folder of the cache (unset: text in the run's cache_dir)."""
    write_batch_size: int = Field(128, ge=1)
    """Embeddings per write."""
    text_encoder_batch_size: int = Field(1, ge=1)
    """Captions per text encoder pass."""
    caption_filter_list: FilterList = ()
    """What is taken out of the captions of datasets that have no list of their own."""


class ImageDataset(_Entry):
    """A folder of images: their captions, their sizes and how often they are seen.

    Sizes (`resolution` and the three `*_size` fields) are in the unit that `resolution_type` says;
    a size of 0 is none.
    """

    dataset_type: Literal["image", "eval"] = "image"
    """Kind of the entry: trained on, or held out for the evaluation loss (eval)."""
    type: Type = "local"  # type: ignore[assignment]
    """Where the images lie."""
    origin: Origin | None = None
    """Where images that don't lie in `instance_data_dir` are brought from (no key of its own)."""
    instance_data_dir: Path
    """Folder of the images, searched with its subfolders."""
    cache_dir_vae: Path
    """Folder of the latents' cache (unset: vae in the run's cache_dir)."""
    text_embeds: str | None = None
    """The text_embeds entry that caches the captions (unset: the default one)."""
    metadata_backend: Literal["discovery", "parquet", "huggingface"] = "discovery"
    """How images are found: by looking into the folder, or in a table."""
    parquet: ParquetTable | None = None
    """The table of metadata_backend and caption_strategy parquet."""

    # sizes and crops
    resolution: float = Field(gt=0)
    """Size that images are trained at."""
    resolution_type: ResolutionType
    """Unit of sizes: shorter edge in pixels; megapixels; pixels of the edge of an equal square."""
    minimum_image_size: float | None = Field(None, ge=0)
    """Smaller images are left out."""
    maximum_image_size: float | None = Field(None, ge=0)
    """Larger images are downsampled before they are cropped."""
    target_downsample_size: float | None = Field(None, ge=0)
    """Size that larger images are downsampled to."""
    minimum_aspect_ratio: float | None = Field(None, gt=0)
    """Images with a smaller width / height are left out."""
    maximum_aspect_ratio: float | None = Field(None, gt=0)
    """Images with a larger width / height are left out."""
    crop: bool = False
    """Crop to crop_aspect; else only what doesn't fit the bucket is cropped."""
    crop_style: Literal["random", "center", "corner", "face"] = "random"
    """Which part of an image a crop keeps; face needs OpenCV (`fluxfast[faces]`)."""
    crop_aspect: Literal["square", "preserve", "random", "closest"] = "square"
    """Shape of a crop: square, the image's own, or one of crop_aspect_buckets."""
    crop_aspect_buckets: tuple[float | dict[str, float], ...] = ()
    """Shapes (width / height) for crop_aspect random and closest; each may have a weight."""
    max_upscale_threshold: float | None = Field(None, ge=0, le=1)
    """Shapes of crop_aspect_buckets that enlarge an image by more are not for it (0.2: 20 %)."""

    # captions
    caption_strategy: CaptionStrategy
    """Where captions come from: the file's name, a .txt beside it, instance_prompt or a table."""
    instance_prompt: str | None = None
    """Caption of every image (instanceprompt), or what is put before each caption."""
    prepend_instance_prompt: bool = False
    """Put instance_prompt before each caption."""
    only_instance_prompt: bool = False
    """Replace each caption by instance_prompt."""
    disable_multiline_split: bool = False
    """A caption file is one caption, not one a line."""
    caption_filter_list: FilterList = ()
    """What is taken out of captions (`caption_filter`)."""
    caption_shuffle: CaptionShuffle | None = None
    """Further captions with their tags in another order."""

    # sampling
    repeats: int = Field(0, ge=0)
    """Extra passes over the dataset in each epoch."""
    probability: float = Field(1.0, ge=0)
    """Weight of the dataset when the next batch's is drawn."""
    max_num_samples: int | None = Field(None, ge=1)
    """Images to use, drawn once by the dataset's id (unset: all)."""
    train_batch_size: int | None = Field(None, ge=1)
    """Images per forward pass (unset: the run's)."""
    vae_batch_size: int | None = Field(None, ge=1)
    """Images per VAE pass (unset: the run's)."""
    vae_cache_ondemand: bool = False
    """Encode an image when a batch first needs it, not before training."""
    vae_cache_disable: bool = False
    """Encode an image whenever a batch needs it, and keep no latents."""
    vae_cache_clear_each_epoch: bool = False
    """Crop, and so encode, each image anew in each epoch, on demand."""
    max_workers: int | None = Field(None, ge=1)
    """Threads that read images (unset: the run's)."""
    start_epoch: int = Field(1, ge=0)
    """First epoch that the dataset takes part in, counted from 1."""
    start_step: int = Field(0, ge=0)
    """First optimiser step that the dataset takes part in."""
    end_epoch: int | None = Field(None, ge=1)
    """Last epoch that the dataset takes part in (unset: it stays)."""
    end_step: int | None = Field(None, ge=1)
    """Last optimiser step that the dataset takes part in (unset: it stays)."""
    timestep_sampling_offset: float = 0.0
    """Added to the normal under the sigmoid schedule: above 0 means more noise."""
    is_regularisation_data: bool = False
    """Train these images towards the base model's own prediction."""
    conditioning: Generators = ()
    """Conditioning datasets to make of the images (`config.generators`)."""
    disable_validation: bool = False
    """Draw no validation images with the references of this dataset."""
    conditioning_data: tuple[str, ...] = ()
    """Ids of the conditioning datasets that hold a partner for each image."""

    @property
    def is_held_out(self) -> bool:
        """Whether nothing is trained on it, and the evaluation loss is computed on it."""
        return self.dataset_type == "eval"

    @property
    def encodes_on_demand(self) -> bool:
        """Whether images are encoded while the run trains."""
        # the epochs to come can't be encoded before training
        return self.vae_cache_ondemand or self.vae_cache_disable or self.vae_cache_clear_each_epoch

    @property
    def picks_buckets(self) -> bool:
        """Whether each crop takes its shape from `crop_aspect_buckets`."""
        return self.crop and self.crop_aspect in ("random", "closest")

    @property
    def crops_at_random(self) -> bool:
        """Whether chance decides what part of an image is kept."""
        return self.crop_style == "random" or (self.crop and self.crop_aspect == "random")

    @property
    def drawn_buckets(self) -> tuple[float | dict[str, float], ...]:
        """`crop_aspect_buckets` but those that `crop_aspect` random never draws."""
        return tuple(
            bucket
            for bucket in self.crop_aspect_buckets
            if self.crop_aspect != "random" or not isinstance(bucket, dict) or bucket["weight"]
        )

    @field_validator("minimum_image_size", "maximum_image_size", "target_downsample_size")
    @classmethod
    def _zero_is_none(cls, value: float | None) -> float | None:
        return value or None

    @field_validator("caption_shuffle")
    @classmethod
    def _disabled_is_none(cls, value: CaptionShuffle | None) -> CaptionShuffle | None:
        return value if value is not None and value.enable else None

    @field_validator("conditioning_data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return ([value] if value else []) if isinstance(value, str) else value

    @field_validator("crop_aspect_buckets", mode="before")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        if not isinstance(value, list) or not any(isinstance(bucket, dict) for bucket in value):
            return value
        if not all(
            isinstance(bucket, dict) and bucket.keys() == {"aspect_bucket", "weight"}
            for bucket in value
        ):
            raise ValueError('expects numbers, or {"aspect_bucket": 1.0, "weight": 0.5} for each')
        return [{"aspect": bucket["aspect_bucket"], "weight": bucket["weight"]} for bucket in value]

    @model_validator(mode="after")
    def _check(self) -> "ImageDataset":
        problems = [
            *_size_problems(self),
            *_caption_problems(self),
            *_window_problems(self),
            *_table_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _size_problems(dataset: ImageDataset) -> list[str]:
    problems = []
    if dataset.maximum_image_size and not dataset.target_downsample_size:
        problems.append(
            '"maximum_image_size" needs "target_downsample_size": the size that larger images '
            "are brought down to"
        )
    for name in ("resolution", "maximum_image_size", "target_downsample_size"):
        size = getattr(dataset, name)
        if size and dataset.resolution_type == "area" and size >= 20:
            problems.append(
                f'"{name}" is {size:g} megapixels with "resolution_type" area: must be less than '
                '20; for edges in pixels set "resolution_type": "pixel_area"'
            )
        # SimpleTuner's bound on pixel edges; the lower one only tells pixels from megapixels
        least = 512 if dataset.resolution_type == "pixel" and name != "resolution" else 16
        if size and dataset.resolution_type != "area" and size < least:
            problems.append(
                f'"{name}" is an edge of {size:g} pixels with "resolution_type" '
                f"{dataset.resolution_type}: must be at least {least}; for megapixels set "
                '"resolution_type": "area"'
            )
    lowest, highest = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if lowest and highest and lowest > highest:
        problems.append(
            f'"minimum_aspect_ratio" ({lowest:g}) is larger than "maximum_aspect_ratio" '
            f"({highest:g})"
        )
    if dataset.crop_aspect in ("random", "closest") and not dataset.crop_aspect_buckets:
        problems.append(
            f'"crop_aspect" {dataset.crop_aspect} needs "crop_aspect_buckets", such as [0.75, '
            "1.0, 1.5]"
        )
    return problems + _bucket_problems(dataset.crop_aspect_buckets)


def _bucket_problems(buckets: tuple[float | dict[str, float], ...]) -> list[str]:
    problems = []
    if any((bucket["aspect"] if isinstance(bucket, dict) else bucket) <= 0 for bucket in buckets):
        problems.append('"crop_aspect_buckets" must be width / height, each larger than 0')
    weights = [bucket["weight"] for bucket in buckets if isinstance(bucket, dict)]
    if weights and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-3):
        problems.append(
            f'"crop_aspect_buckets" have the weights {shown(weights)}: they must add up to 1'
        )
    return problems


def _caption_problems(dataset: ImageDataset) -> list[str]:
    if dataset.instance_prompt:
        return []
    wanting = [
        name
        for name in ("prepend_instance_prompt", "only_instance_prompt")
        if getattr(dataset, name)
    ]
    if dataset.caption_strategy == "instanceprompt":
        wanting.insert(0, "caption_strategy")
    return [
        f'"{name}" is {shown(getattr(dataset, name))}: needs an "instance_prompt"'
        for name in wanting
    ]


def _window_problems(dataset: ImageDataset) -> list[str]:
    problems = []
    for unit in ("epoch", "step"):
        start, end = getattr(dataset, f"start_{unit}"), getattr(dataset, f"end_{unit}")
        if end is not None and end < start:
            problems.append(f'"end_{unit}" ({end}) comes before "start_{unit}" ({start})')
    return problems


# the keys that may say that a table has something
_OF_TABLES = ("caption_strategy", "metadata_backend")


def _table_problems(dataset: ImageDataset) -> list[str]:
    problems = []
    # a generated dataset has its captions from its generator, as others have a table's
    for name in () if isinstance(dataset.origin, Generated) else _OF_TABLES:
        value = getattr(dataset, name)
        if value in ("csv", "huggingface") and dataset.type != value:
            problems.append(f'"{name}" is "{value}": needs "type": "{value}"')
        if value == "parquet" and dataset.parquet is None:
            problems.append(f'"{name}" is "parquet": needs "parquet": {{"path": "table.parquet"}}')
    return problems
