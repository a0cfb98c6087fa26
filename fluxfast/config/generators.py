"""Conditioning datasets that are made of an image dataset: its `conditioning` key.

An entry of it names a generator (`type`), its settings (`params`), what the result is for
(`conditioning_type`) and what the references are called (`captions`). The dataset that it makes has
the id `<id>_conditioning_<type>`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from fluxfast.config.settings import Settings, did_you_mean, problem_text, quoted, shown


class Superresolution(Settings):
    """A blurred, shrunk and compressed copy, to be drawn sharp."""

    blur_radius: float = Field(2.5, ge=0)
    """Radius of the blur in pixels."""
    blur_type: Literal["gaussian", "box"] = "gaussian"
    """Kind of the blur."""
    add_noise: bool = True
    """Add noise."""
    noise_level: float = Field(0.01, ge=0, le=1)
    """Standard deviation of the noise, of a range of 1."""
    jpeg_quality: int | None = Field(85, ge=1, le=95)
    """Quality of a JPEG that the copy goes through (null: none)."""
    downscale_factor: float = Field(2, ge=1)
    """How many times smaller the copy is made before it is enlarged again."""


class JpegArtifacts(Settings):
    """A copy that was compressed too much, to be drawn clean."""

    quality_mode: Literal["random", "range", "fixed"] = "random"
    """Any quality of the range (random, range), or its lowest (fixed)."""
    quality_range: tuple[int, int] = (10, 30)
    """Lowest and highest quality, 1 to 95."""
    compression_rounds: int = Field(1, ge=1, le=20)
    """How many times the copy is compressed."""

    @field_validator("quality_range")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1] <= 95:
            raise ValueError("expects [lowest, highest] quality from 1 to 95")
        return value


class Edges(Settings):
    """White edges on black, by Canny's method."""

    low_threshold: float = Field(100, ge=0, le=255)
    """Gradient of an edge that goes on from a strong one, of 255."""
    high_threshold: float = Field(200, ge=0, le=255)
    """Gradient of a strong edge, of 255."""

    @model_validator(mode="after")
    def _in_order(self) -> "Edges":
        if self.low_threshold > self.high_threshold:
            raise ValueError(
                f"low_threshold ({self.low_threshold:g}) is above high_threshold "
                f"({self.high_threshold:g})"
            )
        return self


class RandomMask(Settings):
    """A white shape on black at a random place, or the image with that shape greyed out."""

    mask_types: tuple[Literal["rectangle", "circle", "brush", "irregular"], ...] = Field(
        ("rectangle", "circle", "brush"), min_length=1
    )
    """Shapes, of which each image gets one."""
    min_coverage: float = Field(0.1, gt=0, lt=1)
    """Least part of the image that the shape covers."""
    max_coverage: float = Field(0.5, gt=0, lt=1)
    """Largest part of the image that the shape covers."""

    @model_validator(mode="after")
    def _in_order(self) -> "RandomMask":
        if self.min_coverage > self.max_coverage:
            raise ValueError(
                f"min_coverage ({self.min_coverage:g}) is above max_coverage "
                f"({self.max_coverage:g})"
            )
        return self


Params: TypeAlias = Superresolution | JpegArtifacts | Edges | RandomMask
GENERATORS: dict[str, type[Params]] = {
    "superresolution": Superresolution,
    "jpeg_artifacts": JpegArtifacts,
    "canny": Edges,
    "edges": Edges,
    "random_masks": RandomMask,
    "inpainting": RandomMask,
}
# SimpleTuner's, which need a network of their own
_WITH_MODELS = ("depth", "depth_midas", "segmentation", "optical_flow")
_PARAM_ALIASES = {"low": "low_threshold", "high": "high_threshold"}


class Generated(Settings):
    """Where a generated dataset's images come from.

    kind: the generator, one of GENERATORS. source: the folder of the images.
    """

    kind: str
    params: Params
    source: Path
    captions: tuple[str, ...] = ()


class Generator(Settings):
    """An entry of `conditioning`."""

    type: str
    """The generator."""
    params: Any = Field(default_factory=dict, validate_default=True)
    """Its settings."""
    captions: tuple[str, ...] = ()
    """What the references are called, one or several; false: as the images are."""
    conditioning_type: (
        Literal["mask", "segmentation", "reference_strict", "reference_loose"] | None
    ) = None
    """What the results are for (unset: masks for random_masks, else strict references)."""

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.startswith(_WITH_MODELS):
            raise ValueError("is not implemented yet: it takes a model of its own")
        if value not in GENERATORS:
            hint = did_you_mean(value, GENERATORS)
            raise ValueError(f"must be one of {quoted(GENERATORS)}{hint}")
        return value

    @field_validator("captions", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if value in (None, False, ""):
            return ()
        if isinstance(value, str):
            return (value,)
        if value is True:
            raise ValueError("must be false, a text or a list of texts")
        return value

    @field_validator("params", mode="before")
    @classmethod
    def _checked(cls, value: Any, info: Any) -> Any:
        kind = info.data.get("type")
        if kind is None:
            return value
        if not isinstance(value or {}, dict):
            raise ValueError(f"expects an object, not {shown(value)}")
        named = {_PARAM_ALIASES.get(name, name): each for name, each in (value or {}).items()}
        model = GENERATORS[kind]
        try:
            return model.model_validate(named)
        except ValidationError as error:
            raise ValueError("; ".join(map(_told(model), error.errors()))) from None

    @property
    def for_what(self) -> str:
        """The `conditioning_type` of its dataset."""
        return self.conditioning_type or (
            "mask" if self.type == "random_masks" else "reference_strict"
        )


def _told(model: type[Settings]) -> Any:
    def tell(detail: Any) -> str:
        name = ".".join(map(str, detail["loc"]))
        if detail["type"] == "extra_forbidden":
            return f'"{name}" is not one of its settings{did_you_mean(name, model.model_fields)}'
        return f'"{name}" {problem_text(detail)}' if name else problem_text(detail)

    return tell


def _as_list(value: Any) -> Any:
    if isinstance(value, dict):
        # an object of `"enabled": false` is off, as a missing one is
        return [value] if value else []
    if not isinstance(value, list) and value not in (None, False, ""):
        raise ValueError('expects a list such as [{"type": "superresolution"}]')
    return value or []


Generators = Annotated[tuple[Generator, ...], BeforeValidator(_as_list)]
