"""What an option of the run's config says of itself beside its type, default, range and meaning.

A field of `TrainFields` is made by `option` in place of pydantic's `Field` where one of these facts
holds for it. The loader, the notes on options without effect and the comparison with a checkpoint
read them here, so that an option needs no entry in another table.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

OnResume = Literal["told", "refused", "start_only", "ignored", "elsewhere"]


class OptionFacts(NamedTuple):
    """The facts of one option.

    Attributes:
        only_with: switches; the option is read only where each of them is on. A switch is a text of
            conditions with " or " between them: `use_ema` (away from its default) or
            `loss_type=huber` (its value matches the pattern).
        on_resume: what a run says that goes on from a checkpoint with another value. "told": a note
            says that the new value holds from now on. "refused": it would be another run.
            "start_only": a note says that it has no effect, since it only decides what an adapter
            begins with. "ignored": no step's result depends on it. "elsewhere": it is compared
            as part of another value, as the seed in use or the adapter's rank.
        aliases: other names of the option.
        ours: whether SimpleTuner has no such option.
        is_secret: whether messages may not show its value.
    """

    only_with: tuple[str, ...] = ()
    on_resume: OnResume = "told"
    aliases: tuple[str, ...] = ()
    ours: bool = False
    is_secret: bool = False


def option(
    default: Any = PydanticUndefined,
    *,
    only_with: str | tuple[str, ...] = (),
    on_resume: OnResume = "told",
    aliases: tuple[str, ...] = (),
    ours: bool = False,
    is_secret: bool = False,
    **field: Any,
) -> Any:
    """pydantic's `Field(default, **field)` with the option's facts."""
    switches = (only_with,) if isinstance(only_with, str) else only_with
    facts = OptionFacts(switches, on_resume, aliases, ours, is_secret)
    return Field(default, json_schema_extra=facts._asdict(), **field)


def facts_of(field: FieldInfo) -> OptionFacts:
    """What the field says of itself; the defaults of `OptionFacts` for a plain field."""
    extra = field.json_schema_extra
    return OptionFacts(**extra) if isinstance(extra, dict) else OptionFacts()  # type: ignore[arg-type]


def aliases_of(fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    """Each option's name by its other names."""
    return {alias: name for name, field in fields.items() for alias in facts_of(field).aliases}
