"""Find and read a run's config file, and the overrides of the command line, as keys and values."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxfast.config.settings import ConfigError, absent, near_file, quoted, read_json

_SUFFIXES = (".json", ".toml", ".env")


def find_config(path: str | Path | None) -> Path:
    """The file to read: `path`, or the one that SimpleTuner would take.

    Without a path that is the environment's CONFIG_PATH; else config/<name>/config.json for the
    name in ENV or SIMPLETUNER_ENV; else config/config.json. A folder, or a name without a suffix,
    is completed by .json, .toml or .env, in this order, or by the suffix that
    SIMPLETUNER_CONFIG_BACKEND or CONFIG_BACKEND names. Raises ConfigError where nothing is found.
    """
    why = ""
    if path is None:
        path = os.environ.get("CONFIG_PATH")
        variable = next((name for name in ("ENV", "SIMPLETUNER_ENV") if os.environ.get(name)), None)
        if path:
            why = f" (from CONFIG_PATH={path})"
        elif variable:
            path, why = (
                Path("config", os.environ[variable], "config"),
                f" (from {variable}={os.environ[variable]})",
            )
        else:
            path = Path("config", "config")
    path = Path(path)
    if path.is_dir():
        path /= "config"
    elif path.suffix in _SUFFIXES or path.is_file():
        return path
    candidates = [path.with_name(path.name + suffix) for suffix in _suffixes()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    near = near_file(candidates[0])
    advice = f"did you mean {near}?" if near else "name one"
    raise ConfigError(
        [
            f"no config file: looked for {quoted(map(str, candidates))} in {Path.cwd()}{why}; "
            f"{advice}"
        ]
    )


def _suffixes() -> tuple[str, ...]:
    for variable in ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND"):
        backend = os.environ.get(variable)
        if backend and f".{backend}" not in _SUFFIXES:
            raise ConfigError([f"{variable} is {backend}: must be json or toml"])
        if backend:
            return (f".{backend}",)
    return _SUFFIXES


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a config file, as written.

    Raises ConfigError where it can't be read or is no config of a run.
    """
    if path.suffix == ".toml":
        raw = read_toml(path)
    elif path.suffix == ".env" or path.name == ".env":
        raise ConfigError(
            [f"{path}: .env configs are not read; write its variables as keys of a config.json"]
        )
    else:
        raw = read_json(path)
    # SimpleTuner's web interface saves the config with metadata beside it
    if isinstance(raw, dict) and "_metadata" in raw and isinstance(raw.get("config"), dict):
        raw = raw["config"]
    if isinstance(raw, list):
        raise ConfigError(
            [f"{path}: holds a list: this is a dataloader config; name it as data_backend_config"]
        )
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: must hold an object of options ({{...}})"])
    return raw


def read_toml(path: Path) -> Any:
    """The value that a TOML file holds; ConfigError where it can't be read."""
    if sys.version_info < (3, 11):
        raise ConfigError(
            [f"{path}: TOML is read with Python 3.11 or newer; use that, or write it as JSON"]
        )
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([absent(str(path), None, "file")]) from None
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}"]) from None
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors
    except ValueError as error:
        raise ConfigError([f"{path}: not valid TOML: {error}"]) from None


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Words such as `["--max-train-steps=10", "--seed", "7", "--vae_enable_tiling"]` as a dict.

    The last of equal keys wins. Raises ConfigError for a word that belongs to no option.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    values: dict[str, Any] = {}
    waiting: str | None = None
    problems = []
    for word in overrides:
        if word.startswith("--") and len(word) > 2:
            key, given, value = word.partition("=")
            name = key[2:].replace("-", "_")
            # a flag is true, unless its value is the next word
            values[name] = value if given else True
            waiting = None if given else name
        elif waiting is not None:
            values[waiting], waiting = word, None
        else:
            problems.append(f'command line: "{word}" belongs to no option: write --option=value')
    if problems:
        raise ConfigError(problems)
    return values
