"""LoRAs that validation draws with beside the one that is trained: `validation_adapter_*`."""

from typing import Any

from pydantic import Field, model_validator

from fluxfast.config.settings import Settings


class ValidationAdapter(Settings):
    """A LoRA and its strength."""

    path: str = Field(min_length=1)
    """File, folder or repository; `owner/name:file.safetensors` is a file of a repository."""
    adapter_name: str | None = None
    """What its images are called by (unset: the file's name)."""
    strength: float = Field(1.0, gt=0)
    """What its output is multiplied with."""

    @property
    def place(self) -> str:
        """The path as `find_lora` takes it."""
        repository, colon, file = self.path.partition(":")
        is_of_repository = colon and file.endswith(".safetensors") and "/" in repository
        return f"{repository}/{file}" if is_of_repository else self.path

    @property
    def name(self) -> str:
        """What its images are called by."""
        last = self.place.rstrip("/").rsplit("/", 1)[-1]
        return self.adapter_name or last.removesuffix(".safetensors")


class ValidationAdapterRun(Settings):
    """LoRAs that validation draws with together."""

    label: str = Field(min_length=1)
    """What its images are called by."""
    adapters: tuple[ValidationAdapter, ...] = Field(min_length=1)
    """The LoRAs."""

    @model_validator(mode="before")
    @classmethod
    def _one_adapter(cls, value: Any) -> Any:
        """An entry may hold one adapter's keys in place of a list."""
        if not isinstance(value, dict):
            return value
        own = {name: value[name] for name in ValidationAdapter.model_fields if name in value}
        if own and "adapters" not in value:
            value = {k: v for k, v in value.items() if k not in own} | {"adapters": [own]}
        if "label" not in value and isinstance(value.get("adapters"), list | tuple):
            adapters = [ValidationAdapter.model_validate(each) for each in value["adapters"]]
            value = value | {"label": "+".join(each.name for each in adapters)}
        return value


def listed_runs(value: Any) -> Any:
    """The entries of a `validation_adapter_config`: one, a list, or an object with `runs`."""
    if isinstance(value, dict):
        value = value.get("runs", [value])
    return value or None
