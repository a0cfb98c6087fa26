"""Every key of a run's config and of a dataset's, in words: for `fluxfast-train keys` and docs."""

import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fluxfast.config.backends import ORIGINS, ParquetTable
from fluxfast.config.caption_shuffle import CaptionShuffle
from fluxfast.config.conditioning import ConditioningDataset
from fluxfast.config.dataset_fields import DatasetDefaults, ImageDataset, TextEmbeds
from fluxfast.config.generators import Generator
from fluxfast.config.option import facts_of
from fluxfast.config.reporting_fields import Webhook
from fluxfast.config.run_fields import TrainFields, TreadRoute
from fluxfast.config.settings import shown
from fluxfast.config.validation_adapters import ValidationAdapter

_WORDS = {int: "whole number", float: "number", str: "text", SecretStr: "text", Path: "path"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


# what a dataset has of the run's config where it doesn't say
_OF_THE_RUN = {field.name for field in fields(DatasetDefaults)} - {"cache_dir", "output_dir"}


# classes of objects that keys hold, by where they are
_NESTED: dict[str, type[BaseModel]] = {
    "tread_config.routes": TreadRoute,
    "webhook_config": Webhook,
    "validation_adapter_config": ValidationAdapter,
    "conditioning": Generator,
    "caption_shuffle": CaptionShuffle,
    "parquet": ParquetTable,
}


class Key(NamedTuple):
    """A key of a config file.

    Attributes:
        section: the title of what it belongs to.
        name: as a file has it.
        values: what it may be.
        default: as a file would have it; "unset" and "required" stand for none.
        meaning: a sentence.
        ours: whether SimpleTuner has no such key.
    """

    section: str
    name: str
    values: str
    default: str
    meaning: str
    ours: bool = False


def sections() -> dict[str, type[BaseModel]]:
    """The classes whose own fields are keys, by title, in the order to read them in."""
    return {
        "The run": TrainFields,
        **{cls.__name__.removesuffix("Fields"): cls for cls in TrainFields.__bases__},
        "Image datasets": ImageDataset,
        **{f"Datasets of type {kind}": cls for kind, cls in ORIGINS.items()},
        "Conditioning datasets": ConditioningDataset,
        "The text cache": TextEmbeds,
        **{f"Objects: {where}": cls for where, cls in _NESTED.items()},
    }


def keys() -> Iterator[Key]:
    """Every key, by section."""
    for section, cls in sections().items():
        for name in _own(cls):
            field = cls.model_fields[name]
            # what a config never says
            if "(no key of its own)" in (field.description or ""):
                continue
            yield Key(
                section,
                name,
                _values(field),
                _default(field, name, cls),
                " ".join((field.description or "").split()),
                facts_of(field).ours,
            )


def _own(cls: type) -> list[str]:
    """The fields that a class has and its bases have not, unless it says them anew."""
    known = getattr(cls, "model_fields", {})
    if cls in (ImageDataset, TextEmbeds):
        return list(known)
    return [name for name in vars(cls).get("__annotations__", {}) if name in known]


def _values(field: FieldInfo) -> str:
    named = [getattr(each.func, "names", None) for each in field.metadata if hasattr(each, "func")]
    if names := next(filter(None, named), None):
        return ", ".join(names())
    bounds = [
        f"{word} {getattr(each, bound):g}"
        for each in field.metadata
        for bound, word in _BOUNDS.items()
        if getattr(each, bound, None) is not None
    ]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    if annotation in _WORDS:
        return _WORDS[annotation]
    if annotation is bool:
        return "true, false"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return "list"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    return "object"


def _default(field: FieldInfo, name: str, cls: type[BaseModel]) -> str:
    if issubclass(cls, ImageDataset | TextEmbeds) and name in _OF_THE_RUN:
        return "the run's"
    if field.is_required():
        return "unset" if "(unset:" in (field.description or "") else "required"
    if field.default is PydanticUndefined or field.default in (None, ()):
        return "unset"
    default = field.default
    return shown(str(default) if isinstance(default, Path) else default)
