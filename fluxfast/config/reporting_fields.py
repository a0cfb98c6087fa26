"""The options of what a run tells others of itself, under SimpleTuner's names: trackers, webhooks.

They are fields of the run's config like all others (`run_fields`). A webhook's address and token
are secrets: they are kept as such, and no message shows them.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator, model_validator

from fluxfast.config.option import option
from fluxfast.config.settings import ConfigError, Settings, expand, quoted, read_json, shown

# what brings a tracker's package, by the tracker's name
TRACKERS = {"tensorboard": "fluxfast", "wandb": "fluxfast[wandb]"}
_NOT_YET = ("swanlab", "comet_ml", "custom-tracker", "simpletuner")
# what configs write where there is no webhook
_OFF: tuple[Any, ...] = (None, False, 0, "", "0", "none", "None", {}, [])


class Webhook(Settings):
    """A web address that gets a run's events, and how."""

    webhook_type: Literal["discord", "raw"]
    """Discord gets lines for people and their images, a raw webhook every event as JSON."""
    webhook_url: SecretStr | None = None
    """The address of a Discord webhook."""
    callback_url: SecretStr | None = None
    """The address of a raw webhook."""
    message_prefix: str = ""
    """Words before each message."""
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    """The least severe events to send."""
    ssl_no_verify: bool = False
    """Trust any certificate."""
    auth_token: SecretStr | None = None
    """What the header X-API-Key says."""

    @model_validator(mode="after")
    def _check_address(self) -> "Webhook":
        key = "webhook_url" if self.webhook_type == "discord" else "callback_url"
        secret = getattr(self, key)
        if secret is None:
            raise ValueError(f'a webhook of type {self.webhook_type} needs a "{key}"')
        if not _is_address(secret.get_secret_value()):
            raise ValueError(f'"{key}" must be an address that begins with http:// or https://')
        token = self.auth_token.get_secret_value() if self.auth_token else ""
        if not (token.isascii() and token.isprintable()) or token != token.strip():
            raise ValueError('"auth_token" may only hold what a header of HTTP can')
        return self

    @property
    def url(self) -> str:
        """The address, which is a secret."""
        secret = self.webhook_url if self.webhook_type == "discord" else self.callback_url
        assert secret is not None
        return secret.get_secret_value()

    @property
    def host(self) -> str:
        """The part of the address that may be shown."""
        return str(urlsplit(self.url).hostname)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # a port that is no number raises an error only when it is asked for
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


class ReportingFields(Settings):
    """What a config file can say of trackers and webhooks."""

    report_to: str = option("none", on_resume="ignored")
    """Trackers of metrics and images: tensorboard, wandb, several between commas, all, or none."""
    tracker_project_name: str = option("", on_resume="ignored")
    """Project in the tracker (empty: tracker_run_name's default, without spaces)."""
    tracker_run_name: str = option("", on_resume="ignored")
    """Run in the tracker and title of the LoRA (empty: the output folder or instance_prompt)."""
    tracker_image_layout: Literal["gallery", "table"] = option(
        "gallery", only_with="report_to=*wandb* or report_to=all", on_resume="ignored"
    )
    """How Weights & Biases shows validation images: side by side, or a row each with its prompt."""
    logging_dir: Path = option(Path("logs"), on_resume="ignored")
    """Folder for the tracker's files."""
    webhook_config: tuple[Webhook, ...] | None = option(None, on_resume="ignored", is_secret=True)
    """Webhooks that get the run's events: one, a list, or a JSON file of these."""
    webhook_reporting_interval: int | None = option(
        None, ge=1, only_with="webhook_config", on_resume="ignored"
    )
    """Steps between reports of progress to webhooks (unset: raw ones get each step's)."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _read_trackers(cls, value: Any) -> Any:
        names = (value.split(",") if isinstance(value, str) else value) if value else ["none"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expects names of trackers, not {shown(value)}")
        names = [name.strip().lower() for name in names]
        offered = f"fluxfast has {quoted(TRACKERS)}, several of them between commas, all or none"
        for name in names:
            if name in _NOT_YET:
                raise ValueError(f"{name} is not implemented yet; {offered}")
            if name not in (*TRACKERS, "all", "none"):
                raise ValueError(f"there is no tracker {shown(name)}; {offered}")
        if len(names) > 1 and {"all", "none"} & {*names}:
            raise ValueError("all and none stand alone")
        return ",".join(dict.fromkeys(names))

    @field_validator("webhook_config", mode="before")
    @classmethod
    def _read_webhooks(cls, value: Any) -> Any:
        if value in _OFF:
            return None
        if isinstance(value, str):
            value = _webhooks_in(value)
        return [value] if isinstance(value, dict | Webhook) else value

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers in use; `all` means those whose packages are installed."""
        if self.report_to == "all":
            return tuple(name for name in TRACKERS if is_installed(name))
        return tuple(name for name in self.report_to.split(",") if name != "none")


def is_installed(tracker: str) -> bool:
    """Whether a tracker's package is there."""
    spec = find_spec(tracker)
    # W&B's folder of runs has its package's name, and is none
    return spec is not None and spec.origin is not None


def _webhooks_in(text: str) -> Any:
    """What a JSON text or a JSON file holds; its `{env:VAR}` are replaced."""
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"is not valid JSON: {error}") from None
    problems: list[str] = []
    try:
        webhooks = expand(read_json(Path(text).expanduser()), {}, problems, text)
    except ConfigError as error:
        # the lines after the first show the file's text, and with it perhaps an address
        raise ValueError(str(error).split("\n")[0]) from None
    if problems:
        raise ValueError("; ".join(problems))
    return webhooks
