"""The dataloader's config: SimpleTuner's `multidatabackend.json` as typed, frozen objects.

The file is a list of entries: image datasets, and one `text_embeds` entry that says where the text
encoders' outputs are cached. A value that a dataset leaves out is the run's (`DatasetDefaults`).
Nothing on disk is looked at here but the file itself, and whether a package that a key needs is
installed.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fluxfast.config.backends import ORIGINS, ParquetTable, package_problems, take_origin
from fluxfast.config.cache_folders import latents_folder
from fluxfast.config.caption_shuffle import CaptionShuffle
from fluxfast.config.conditioning import ConditioningDataset, generated, link
from fluxfast.config.dataset_fields import DatasetDefaults, ImageDataset, TextEmbeds
from fluxfast.config.dataset_keys import (
    ACCEPTED_NO_EFFECT,
    ALIASES,
    DATASET_TYPES_NOT_YET,
    NOT_IMPLEMENTED,
    TYPES_NOT_YET,
    VALUE_ALIASES,
    VALUES_NOT_YET,
)
from fluxfast.config.face_detector import INSTALL, face_cascade
from fluxfast.config.generators import Generator
from fluxfast.config.settings import (
    ConfigError,
    Settings,
    as_bool,
    did_you_mean,
    expand,
    is_default,
    problem_text,
    quoted,
    read_json,
    shown,
)
from fluxfast.text import lines, printable

__all__ = ["DataConfig", "DatasetDefaults", "ImageDataset", "TextEmbeds", "load_data_config"]

_MODELS: dict[str, type[ImageDataset] | type[TextEmbeds]] = {
    "image": ImageDataset,
    "eval": ImageDataset,
    "conditioning": ConditioningDataset,
    "text_embeds": TextEmbeds,
}
# what a dataset has of the run's for its captions
_CAPTIONS = (
    "caption_strategy", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt",
)  # fmt: skip
# keys that say how a dataset is trained on
_OF_TRAINING = {
    "repeats", "probability", "train_batch_size", "start_epoch", "start_step", "end_epoch",
    "end_step", "timestep_sampling_offset", "is_regularisation_data", "vae_cache_clear_each_epoch",
}  # fmt: skip
# keys whose value is an object
_NESTED: dict[str, type[Settings]] = {
    "caption_shuffle": CaptionShuffle,
    "conditioning": Generator,
    "parquet": ParquetTable,
}
_NESTED_KEYS = [(key, name) for key, model in _NESTED.items() for name in model.model_fields]


class DataConfig(Settings):
    """The enabled datasets in the file's order, the text cache, and notes that a run prints.

    `images` are trained on, `held_out` are for the evaluation loss.
    """

    images: tuple[ImageDataset, ...]
    held_out: tuple[ImageDataset, ...] = ()
    text_embeds: TextEmbeds
    notes: tuple[str, ...] = ()
    linked: dict[str, tuple[ConditioningDataset, ...]] = Field(default_factory=dict)

    def conditions(self, id: str) -> tuple[ConditioningDataset, ...]:
        """The conditioning datasets of an image dataset, with its sizes."""
        return self.linked.get(id, ())

    @property
    def datasets(self) -> list[ImageDataset]:
        """Those that are trained on, then those that are held out."""
        return [*self.images, *self.held_out]

    @property
    def folders(self) -> list[ImageDataset]:
        """Every dataset that has a folder of images, each once."""
        conditions = {each.id: each for own in self.linked.values() for each in own}
        return [*self.datasets, *conditions.values()]


def load_data_config(path: str | Path, *, defaults: DatasetDefaults) -> DataConfig:
    """The dataloader's config in the file at `path`.

    Raises:
        ConfigError: it names every entry's keys that are unknown, not implemented yet, of a wrong
            value or in conflict, repeated ids, and a missing image dataset or text cache. Whether
            the folders exist is not looked at.
    """
    config, _, problems = check_data_config(path, defaults=defaults)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _entries(path: Path) -> list[Any]:
    """The entries of a dataloader's config, whatever they are."""
    entries = read_json(path)
    if not isinstance(entries, list):
        held = (
            "an object (is it the run's config?)" if isinstance(entries, dict) else "something else"
        )
        raise ConfigError(
            [f"{path}: must hold a list of datasets ([{{...}}, ...]), and holds {held}"]
        )
    return entries


def check_data_config(
    path: str | Path, *, defaults: DatasetDefaults
) -> tuple[DataConfig | None, list[ImageDataset], list[str]]:
    """(config, datasets, problems), for those who look for further problems.

    With problems the config is None, and the datasets with folders of images are those that could
    be read. ConfigError where the file can't be.
    """
    path = Path(path)
    problems: list[str] = []
    notes: list[str] = []
    images: list[ImageDataset] = []
    conditions: list[ConditioningDataset] = []
    texts: list[TextEmbeds] = []
    seen: set[str] = set()
    for position, entry in enumerate(_entries(path), 1):
        where = f"{path}: entry {position}"
        if not isinstance(entry, dict):
            problems.append(f"{where}: must be an object ({{...}}), not {shown(entry)}")
            continue
        if "id" in entry:
            where = f'{path}: dataset "{printable(entry["id"])}"'
        parsed = _read_entry(entry, defaults, where, problems, notes)
        if entry.get("id") is not None and str(entry["id"]) in seen:
            problems.append(f"{where}: this id is taken by an entry before it; give each its own")
        seen.add(str(entry.get("id")))
        if isinstance(parsed, ConditioningDataset):
            conditions.append(parsed)
        elif isinstance(parsed, ImageDataset):
            if parsed.crop_style == "face" and face_cascade() is None:
                problems.append(
                    f'{where}: "crop_style" is "face": needs a face detector, which is not '
                    f'installed: {INSTALL}, or set "crop_style": "center"'
                )
            images.append(parsed)
            notes += _idle(parsed, where)
        elif parsed is not None:
            texts.append(parsed)
    text = None
    linked: dict[str, tuple[ConditioningDataset, ...]] = {}
    # an entry that couldn't be read may be the one that the others lack
    if not problems:
        problems += _whole_problems([each for each in images if not each.is_held_out], path)
        text = _default_texts(texts, images, path, problems)
        for image in images:
            for made in generated(image, defaults.cache_dir):
                if made.id in seen:
                    problems.append(
                        f'{path}: dataset "{image.id}": "conditioning" makes a dataset '
                        f'"{made.id}", and another one has this id; give each its own'
                    )
                seen.add(made.id)
                conditions.append(made)
        linked, found = link(images, conditions, path)
        problems += found
    if problems or text is None:
        return None, [*images, *conditions], problems
    filtered = [_with_filters(image, text) for image in images]
    images = [image for image in filtered if not image.is_held_out]
    held_out = [image for image in filtered if image.is_held_out]
    if all(image.is_regularisation_data for image in images):
        notes.append(
            "every dataset is regularisation data: the LoRA is only held to the base model's "
            "own predictions"
        )
    config = DataConfig(
        images=tuple(images),
        held_out=tuple(held_out),
        text_embeds=text,
        notes=tuple(notes),
        linked=linked,
    )
    return config, config.folders, []


def _read_entry(
    entry: dict[str, Any],
    defaults: DatasetDefaults,
    where: str,
    problems: list[str],
    notes: list[str],
) -> ImageDataset | TextEmbeds | None:
    """The entry as an object; None where it is disabled or a value is wrong.

    Its problems and notes are added to the two lists.
    """
    # SimpleTuner's placeholders
    known = {
        "model_family": "flux",
        "output_dir": str(defaults.output_dir),
        "id": str(entry.get("id", "")),
    }
    values = _canonical(expand(entry, known, problems, where), where, problems)
    try:
        if as_bool(values.pop("disabled", False)):
            # its other keys are not looked at, as they may belong to a kind of entry yet to come
            notes.append(f"{where} is disabled")
            return None
    except ValueError as error:
        problems.append(f'{where}: "disabled" {error}')
    if "conditioning_type" in values and values.get("dataset_type", "image") == "image":
        values["dataset_type"] = "conditioning"
    kind = values.get("dataset_type", "image")
    if kind not in _MODELS:
        kinds = (*_MODELS, *DATASET_TYPES_NOT_YET)
        why = (
            "not implemented yet"
            if kind in kinds
            else f"not a kind of dataset{did_you_mean(str(kind), kinds)}"
        )
        problems.append(
            f'{where}: "dataset_type" is {shown(kind)}: {why}; fluxfast has {quoted(_MODELS)}'
        )
        return None
    if values.get("type") in TYPES_NOT_YET:
        # its other keys, which are of that type, are not looked at
        problems.append(
            f'{where}: "type" is {shown(values["type"])}: not implemented yet; fluxfast has '
            f"{quoted(['local', *ORIGINS])}"
        )
        return None
    model = _MODELS[kind]
    if model is not TextEmbeds:
        take_origin(values, defaults.cache_dir, where, problems, notes)
    elif values.get("type") in ORIGINS:
        problems.append(
            f'{where}: "type" is {shown(values["type"])}: the text cache is a folder of this '
            'machine: set "type": "local" and a "cache_dir"'
        )
        return None
    fields = _with_defaults(values, model, defaults)
    for name in [name for name in fields if name not in model.model_fields]:
        _without_field(name, fields.pop(name), model, where, problems, notes)
    problems += package_problems(fields, where)
    return _build(model, fields, where, problems)


def _idle(image: ImageDataset, where: str) -> list[str]:
    """A note on each key that has no effect beside the others."""
    idle = []
    if image.is_held_out and (trained := image.model_fields_set & _OF_TRAINING):
        idle.append(f"{quoted(sorted(trained))} no effect: nothing is trained on it")
    if image.max_upscale_threshold is not None and not image.picks_buckets:
        idle.append(
            '"max_upscale_threshold" has no effect: only "crop": true with "crop_aspect" "closest" '
            'or "random" chooses among buckets; "minimum_image_size" leaves small images out'
        )
    if image.parquet and "parquet" not in (image.metadata_backend, image.caption_strategy):
        idle.append('"parquet" has no effect without metadata_backend or caption_strategy parquet')
    if image.vae_cache_clear_each_epoch and not image.crops_at_random:
        idle.append(
            '"vae_cache_clear_each_epoch" encodes each image anew and gives the same latents: '
            '"crop_style" and "crop_aspect" leave nothing to chance'
        )
    return [f"{where}: {note}" for note in idle]


def _canonical(entry: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    for key, value in entry.items():
        name = ALIASES.get(key, key)
        if name in values:
            problems.append(
                f'{where}: "{written[name]}" and "{key}" are the same key: keep one of them'
            )
        # null asks for the default, and __keys__ are the web interface's
        elif value is not None and not name.startswith("__"):
            value = VALUE_ALIASES.get((name, value), value) if isinstance(value, str) else value
            values[name], written[name] = value, key
    return values


def _with_defaults(
    values: dict[str, Any], model: type[Settings], defaults: DatasetDefaults
) -> dict[str, Any]:
    inherited = {
        name: value for name, value in asdict(defaults).items() if name in model.model_fields
    }
    if model is ConditioningDataset:
        # its images need no captions, and the run's are those of its source's images
        inherited = {name: value for name, value in inherited.items() if name not in _CAPTIONS}
    if model is TextEmbeds:
        inherited["cache_dir"] = defaults.cache_dir / "text"
    else:
        inherited["cache_dir_vae"] = latents_folder(defaults.cache_dir, str(values.get("id")))
    # an empty folder name asks for the default as well
    return {
        **inherited,
        **{name: value for name, value in values.items() if value != "" or name not in inherited},
    }


def _without_field(
    name: str, value: Any, model: type[Settings], where: str, problems: list[str], notes: list[str]
) -> None:
    if name in ACCEPTED_NO_EFFECT:
        if not is_default(value, None):
            notes.append(f'{where}: "{name}" has no effect: {ACCEPTED_NO_EFFECT[name]}')
    elif name in NOT_IMPLEMENTED:
        off = isinstance(value, dict) and is_default(
            value.get("enable", value.get("enabled", True)), False
        )
        if not off and not is_default(value, None) and not is_default(value, NOT_IMPLEMENTED[name]):
            problems.append(f'{where}: "{name}" is {shown(value)}: not implemented yet; remove it')
    elif any(name in other.model_fields for other in _MODELS.values()):
        kinds = quoted(kind for kind, other in _MODELS.items() if name in other.model_fields)
        problems.append(
            f'{where}: "{name}" is a key of entries whose "dataset_type" is {kinds}; remove it here'
        )
    else:
        known = {*model.model_fields, *ALIASES, *NOT_IMPLEMENTED, *ACCEPTED_NO_EFFECT, "disabled"}
        problems.append(f'{where}: "{name}" is not a key of a dataset{did_you_mean(name, known)}')


def _build(
    model: type[ImageDataset] | type[TextEmbeds],
    fields: dict[str, Any],
    where: str,
    problems: list[str],
) -> ImageDataset | TextEmbeds | None:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False)
    for name, detail in {
        _key_of(detail["loc"]): detail for detail in reversed(details) if detail["loc"]
    }.items():
        if detail["type"] == "literal_error" and detail["input"] in VALUES_NOT_YET.get(name, ()):
            text = (
                f"is {shown(detail['input'])}: not implemented yet; fluxfast has "
                f"{detail['ctx']['expected']}"
            )
        elif detail["type"] == "extra_forbidden":
            text = "is not a key" + did_you_mean(name, map(_key_of, _NESTED_KEYS))
        else:
            text = problem_text(detail)
        problems.append(f'{where}: "{name}" {text}')
    problems += [
        f"{where}: {line}"
        for detail in details
        if not detail["loc"]
        for line in lines(str(detail["ctx"]["error"]))
    ]
    return None


def _key_of(loc: tuple[int | str, ...]) -> str:
    """The key that an error is about; a key within an object follows after a dot."""
    # within other values, pydantic names positions and types
    return ".".join(map(str, loc if loc[0] in _NESTED else loc[:1]))


def _default_texts(
    texts: list[TextEmbeds], images: list[ImageDataset], path: Path, problems: list[str]
) -> TextEmbeds | None:
    """The entry that caches every caption: the only one, or the only default one."""
    default = texts if len(texts) == 1 else [text for text in texts if text.default]
    if not texts:
        problems.append(
            f'{path}: no entry for the text cache: add {{"id": "text-embeds", "type": "local", '
            '"dataset_type": "text_embeds", "default": true, "cache_dir": "cache/text"}'
        )
    elif len(default) != 1:
        ids = quoted(text.id for text in default or texts)
        problems.append(
            f'{path}: exactly one text_embeds entry must have "default": true; {len(default)} '
            f"of {ids} have it"
        )
    for image in images:
        if image.text_embeds is None or len(default) != 1 or image.text_embeds == default[0].id:
            continue
        where = f'{path}: dataset "{image.id}": "text_embeds" is {shown(image.text_embeds)}'
        if image.text_embeds in (text.id for text in texts):
            problems.append(
                f"{where}: another text cache than the default one is not implemented yet; "
                "remove it"
            )
        else:
            problems.append(f"{where}: there is no text_embeds entry with this id")
    return default[0] if len(default) == 1 else None


def _with_filters(image: ImageDataset, text: TextEmbeds) -> ImageDataset:
    """SimpleTuner's `caption_filter_list` is the text cache's; a dataset's own comes before it."""
    if image.caption_filter_list or not text.caption_filter_list:
        return image
    return image.model_copy(update={"caption_filter_list": text.caption_filter_list})


def _whole_problems(images: list[ImageDataset], path: Path) -> list[str]:
    if not images:
        return [
            f"{path}: no image dataset to train on is enabled: add one, or remove "
            '"disabled" from one'
        ]
    problems = []
    if not any(image.start_epoch <= 1 and image.start_step <= 1 for image in images):
        problems.append(
            f'{path}: no dataset takes part from the start: leave "start_epoch" and '
            '"start_step" out of one'
        )
    if not any(image.probability for image in images):
        problems.append(f'{path}: the "probability" of every dataset is 0: raise one')
    return problems
