"""The files and folders of this machine that a run reads: which of them are not there.

They are looked for when the configs have been read, before torch is imported, so that all that is
wrong is told at once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fluxfast.config.backends import CsvFile
from fluxfast.config.dataset_fields import ImageDataset
from fluxfast.config.datasets import DataConfig, check_data_config
from fluxfast.config.public import is_hub_lora, is_hub_name
from fluxfast.config.run import TrainConfig, check_config
from fluxfast.config.run_file import find_config
from fluxfast.config.settings import ConfigError, absent


class _Named(NamedTuple):
    """What a run reads: the option, its path, and what tells whether that is the Hub's."""

    option: str
    path: str | None
    is_on_hub: Callable[[str], bool] | None = None


def load_run(
    path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    needs_models: bool = True,
) -> tuple[TrainConfig, DataConfig]:
    """A run's config and its dataloader's, as `load_config` and `load_data_config` read them.

    needs_models: whether models, LoRAs and prompts are read too, and not images alone.

    Raises:
        ConfigError: it names all problems of both, and every file and folder that is not there.
    """
    file = find_config(path)
    config, problems = check_config(file, overrides)
    if config is None:
        raise ConfigError(problems)
    named = _backend(config) + (_models(config) if needs_models else [])
    problems += [f"{file}: {problem}" for problem in _missing(named, file.parent)]
    backend, data = config.data_backend_config, None
    # without a name there is a problem already
    if "data_backend_config" in config.model_fields_set and backend.exists():
        try:
            data, datasets, found = check_data_config(backend, defaults=config.dataset_defaults)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        problems += [*found, *missing_data(config, datasets, file.parent)]
    if problems or data is None:
        raise ConfigError(problems)
    return config, data


def missing_data(
    config: TrainConfig, datasets: Iterable[ImageDataset], beside: Path | None = None
) -> list[str]:
    """A line for each folder of images, and each table of a dataset, that is not there.

    beside: the folder in which the run's config lies.
    """
    problems = []
    for dataset in datasets:
        read = []
        if dataset.origin is None and not dataset.instance_data_dir.is_dir():
            read.append(("instance_data_dir", dataset.instance_data_dir, "folder"))
        if isinstance(dataset.origin, CsvFile) and not dataset.origin.csv_file.is_file():
            read.append(("csv_file", dataset.origin.csv_file, "file"))
        if dataset.parquet is not None and not dataset.parquet.path.is_file():
            read.append(("parquet.path", dataset.parquet.path, "file"))
        problems += [
            f'{config.data_backend_config}: dataset "{dataset.id}": "{key}" is '
            + absent(str(path), beside, kind)
            for key, path, kind in read
        ]
    return problems


def _missing(named: Iterable[_Named], beside: Path) -> Iterator[str]:
    """A line for each file or folder that is not there."""
    for option, path, is_on_hub in dict.fromkeys(named):
        if not path or Path(path).expanduser().exists() or (is_on_hub and is_on_hub(path)):
            continue
        kind = "file or folder" if is_on_hub else "file"
        yield f'"{option}" is {absent(path, beside, kind)}'


def _backend(config: TrainConfig) -> list[_Named]:
    is_given = "data_backend_config" in config.model_fields_set
    return [_Named("data_backend_config", str(config.data_backend_config))] if is_given else []


def _models(config: TrainConfig) -> list[_Named]:
    """Models, LoRAs, and prompts for validation."""
    named = [
        _Named(option, getattr(config, option), is_hub_name)
        for option in (
            "pretrained_model_name_or_path",
            "pretrained_transformer_model_name_or_path",
            "pretrained_vae_model_name_or_path",
            "pretrained_t5_model_name_or_path",
        )
    ]
    named.append(_Named("assistant_lora_path", config.assistant_lora, is_hub_lora))
    # a run that is resumed has its checkpoint's values, and these files may be gone
    if not any(config.output_dir.glob("checkpoint-*")):
        named.append(_Named("init_lora", config.init_lora, is_hub_lora))
        if config.use_ema:
            named.append(_Named("init_lora_ema", config.init_lora_ema, is_hub_lora))
    if config.validation_disable:
        return named
    library = config.user_prompt_library
    return [
        *named,
        _Named("user_prompt_library", str(library) if library else None),
        *(
            _Named("validation_adapter_path", adapter.place, is_hub_lora)
            for run in config.validation_adapters
            for adapter in run.adapters
        ),
    ]
