"""The options of a run that puts its adapter on the Hugging Face Hub, under SimpleTuner's names.

They are fields of the run's config like all others (`run_fields`).
"""

import re

from pydantic import field_validator

from fluxfast.config.option import option
from fluxfast.config.settings import Settings, shown

# the switch that these options are only read with
_PUSH = "push_to_hub"
# the Hub takes names of up to 96 characters, which begin and end in a letter or digit
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REPOSITORY = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+|\.{2,}")


class HubFields(Settings):
    """What a config file can say of uploads to the Hub."""

    push_to_hub: bool = option(False, on_resume="ignored")
    """Upload the adapter to the Hugging Face Hub at the end of the run."""
    push_checkpoints_to_hub: bool = option(False, only_with=_PUSH, on_resume="ignored")
    """Upload the adapter of each checkpoint too."""
    push_to_hub_background: bool = option(False, only_with=_PUSH, on_resume="ignored")
    """Train on while checkpoints are uploaded."""
    hub_model_id: str | None = option(None, only_with=_PUSH, on_resume="ignored")
    """Repository, "name" or "owner/name" (unset: tracker_project_name's letters and digits)."""
    model_card_private: bool = option(True, only_with=_PUSH, on_resume="ignored")
    """Make a new repository a private one."""
    model_card_safe_for_work: bool = option(False, only_with=_PUSH, on_resume="ignored")
    """Leave out the card's tag "not-for-all-audiences"."""
    model_card_note: str | None = option(None, only_with=_PUSH, on_resume="ignored")
    """Text of your own for the card, in Markdown."""

    @field_validator("hub_model_id")
    @classmethod
    def _check_repository(cls, value: str | None) -> str | None:
        if value is not None and (
            not _REPOSITORY.fullmatch(value) or re.search(r"--|\.\.|\.git$", value)
        ):
            raise ValueError(
                "expects a repository of the Hub, name or owner/name, of letters, digits and "
                f"single - _ . between them, not {shown(value)}"
            )
        return value


def repository_name(text: str) -> str:
    """The nearest name of a repository to a text; "lora" where nothing of it can be in one."""
    words = (word.strip("._") for word in _NOT_IN_NAMES.sub("-", text).split("-"))
    name = "-".join(word for word in words if word)[:96].strip("-._")
    return (name.removesuffix(".git") or "lora") if name else "lora"
