"""What the run's config and the dataloader's config share: reading a file and naming its mistakes.

Readers collect every problem, a line each that names file, key and value and says what to do, and
raise them together as one `ConfigError`, so that a user need not find them one at a time.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticKnownError

from fluxfast.text import is_text, nearest, printable, text_problem

_ENV = re.compile(r"\{env:([^{}]*)\}")
_BOOL = TypeAdapter(bool)


class ConfigError(ValueError):
    """What a config file asks for can't be done; `problems` holds every reason."""

    def __init__(self, problems: Sequence[str]):
        # a config may hold characters that no terminal prints; a problem may have several lines,
        # as a syntax error does
        self.problems = tuple(
            "\n".join(map(printable, problem.split("\n"))) for problem in problems
        )
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = (f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            super().__init__(
                "\n".join([f"{len(self.problems)} problems in the configuration:", *lines])
            )


class Settings(BaseModel):
    """Base of the typed config objects.

    They are frozen and take no unknown keys; numbers and booleans may be written as strings.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        # what a field means stands below it
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = (annotation, *get_args(annotation))
        for text in _strings(value):
            # a file's name is any bytes but zero; other texts must be UTF-8
            if problem := text_problem(text, file_name=Path in kinds):
                raise ValueError(problem)
        # saved forms write "" where nothing was filled in
        if value == "" and type(None) in get_args(annotation):
            return None
        # pydantic would take true for the number 1
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("expects a value, not true or false")
        return value


def _utf8(path: Path) -> Path:
    if not is_text(str(path)):
        raise ValueError(
            "is not UTF-8, and safetensors reads no file below such a name; name another folder"
        )
    return path


# a folder for safetensors files
Utf8Path = Annotated[Path, AfterValidator(_utf8)]


def named_in(names: Callable[[], Iterable[str]]) -> BeforeValidator:
    """A validator that refuses all but some names, as a `Literal` of them would.

    The names are asked for at each value, so that a record added to a table counts at once.
    """

    def check(value: Any) -> Any:
        known = list(names())
        if value in known:
            return value
        *others, last = [f"'{name}'" for name in known]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticKnownError("literal_error", {"expected": expected})

    # for those who describe the field
    check.names = names  # type: ignore[attr-defined]
    return BeforeValidator(check)


def _strings(value: Any) -> Iterable[str]:
    """Every string in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def read_json(path: Path) -> Any:
    """The value that a JSON file holds.

    Raises ConfigError where it can't be read, is not UTF-8, repeats a key or is not valid JSON,
    which the message shows the line of.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([absent(str(path), None, "file")]) from None
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: not UTF-8 text (byte {error.start}); is this the right file?"]
        ) from None
    # a name with a zero character
    except ValueError as error:
        raise ConfigError([f"{shown(str(path))}: can't be a file's name: {error}"]) from None
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_not_a_number)
    except json.JSONDecodeError as error:
        raise ConfigError([_syntax_problem(path, text, error)]) from None
    except RecursionError:
        raise ConfigError([f"{path}: nested too deeply to be a config file"]) from None
    # what the two hooks raise, and Python's limit on the digits of an integer
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None


def absent(path: str, beside: Path | None, kind: str = "file or folder") -> str:
    """That nothing is at `path`, where it was looked for, and what lies near.

    beside: the folder of the config that names it, where somebody may expect relative paths to
    start.
    """
    written = Path(path).expanduser()
    text = f"{path}: no such {kind}"
    if not written.is_absolute():
        text += f" in {Path.cwd()}, where relative paths start"
        if beside is not None and (beside / written).exists():
            return f"{text}; {beside / written} is there: write that, or start in {beside}"
    near = near_file(written)
    return text if near is None else f"{text}; did you mean {near}?"


def near_file(path: Path) -> Path | None:
    """What lies beside `path` under the nearest name."""
    try:
        near = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    # there is no such folder either, or it can't be read
    except (OSError, ValueError):
        return None
    return None if near is None else path.parent / near


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(
            f"{quoted(repeated)} given more than once in the same object: keep one of them"
        )
    return dict(pairs)


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _syntax_problem(path: Path, text: str, error: json.JSONDecodeError) -> str:
    line = text.split("\n")[error.lineno - 1]
    shown_whole = "".join(c if c.isprintable() else " " for c in line)
    # a window around the place, since a file may be a single line
    first = max(0, error.colno - 60)
    shown_line, caret = shown_whole[first : first + 100], " " * (error.colno - 1 - first) + "^"
    hint = ""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not text.strip():
        hint = " (the file is empty)"
    elif re.match(r",\s*[}\]]", after) or (before.endswith(",") and after[:1] in ("}", "]")):
        hint = " (JSON allows no comma after the last entry: remove it)"
    elif after.startswith(("//", "#", "/*")):
        hint = " (JSON allows no comments: remove it)"
    elif after.startswith("'"):
        hint = " (JSON strings take double quotes)"
    where = f"{path}:{error.lineno}:{error.colno}"
    return f"{where}: not valid JSON: {error.msg}{hint}\n    {shown_line}\n    {caret}"


def expand(value: Any, placeholders: dict[str, str], problems: list[str], where: str) -> Any:
    """`value` with `{env:VAR}` and each `{placeholder}` replaced in the strings at any depth.

    A variable that isn't set adds a line to `problems`, which starts with `where`.
    """
    if isinstance(value, dict):
        return {
            key: expand(inner, placeholders, problems, f'{where} "{key}"')
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [expand(inner, placeholders, problems, where) for inner in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in _ENV.findall(value) if name not in os.environ]
    problems += [
        f"{where}: the environment variable {name} in {{env:{name}}} is not set" for name in missing
    ]
    if missing:
        return value
    value = _ENV.sub(lambda match: os.environ[match[1]], value)
    for name, replacement in placeholders.items():
        value = value.replace(f"{{{name}}}", replacement)
    return value


def quoted(names: Iterable[str]) -> str:
    """`"a", "b"`, for a message."""
    return ", ".join(f'"{name}"' for name in names)


def shown(value: object) -> str:
    """A value as the config file would write it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest known name, or nothing."""
    near = nearest(key, sorted(known))
    return f'; did you mean "{near}"?' if near else ""


def as_bool(value: Any) -> bool:
    """True or false, also as the strings and numbers that SimpleTuner's configs hold.

    Raises ValueError for anything else.
    """
    try:
        return _BOOL.validate_python(value)
    except ValidationError:
        raise ValueError(f"expects true or false, not {shown(value)}") from None


def is_default(value: Any, default: Any) -> bool:
    """Whether `value`, as a file writes it, says the same as an option's default.

    A default of None is an option that is off.
    """
    if default is None:
        return value in (None, "", [], {}, False) or str(value).lower() in ("none", "false")
    try:
        if isinstance(default, bool):
            return as_bool(value) == default
        if isinstance(default, int | float):
            return not isinstance(value, bool) and float(value) == default
    except (TypeError, ValueError):
        return False
    return value == default


def problem_text(error: ErrorDetails, *, is_secret: bool = False) -> str:
    """One of pydantic's errors in the words of our messages, without the field's name.

    is_secret: whether the value may not be shown.
    """
    if error["type"] == "missing":
        return "is required"
    hidden = is_secret or isinstance(error["input"], dict | BaseModel)
    got = "" if hidden else f"is {shown(error['input'])}: "
    if error["type"] == "literal_error":
        return f"{got}must be {error['ctx']['expected']}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return got + message[:1].lower() + message[1:]
