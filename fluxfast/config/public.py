"""What of a run's config may leave the machine, and what of it may be shown at all.

A public config holds the options whose values can't be texts of the user's own (numbers, switches,
choices among given words) and the few texts that a reader needs to do the same run again. Texts are
cleaned of secrets and of this machine's paths even so: a prompt or a note may hold either.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fluxfast.config.derived import DerivedValues

REMOVED = "[removed]"
# owner/name, or owner/name/<a file in it>
HUB_LORA = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?")
# options whose values are texts, and which tell no more than how the run was trained
_TEXTS = frozenset({
    "model_flavour", "lora_type", "lycoris_config", "tread_config", "peft_lora_target_modules",
    "optimizer", "optimizer_config", "eval_dataset_id", "instance_prompt", "validation_prompt",
    "validation_negative_prompt", "validation_resolution", "tracker_project_name",
    "tracker_run_name", "hub_model_id", "model_card_note", "attention_mechanism",
})  # fmt: skip
# options that name a part of the model: public where that is a repository of the Hub
_REPOSITORIES = frozenset({
    "pretrained_model_name_or_path", "pretrained_transformer_model_name_or_path",
    "pretrained_vae_model_name_or_path", "pretrained_t5_model_name_or_path",
    "assistant_lora_path", "init_lora", "pretrained_evaluation_model_name_or_path",
})  # fmt: skip
# names of options, or of keys in their values, that hold secrets
_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|api_?key|credentials?|webhooks?|url|auth)([_-]|$)", re.I
)
_SAFE_ADDRESS = re.compile(r"https?://(?:[\w-]+\.)+[a-z]{2,}(?:/[\w.~/()%-]*)?[.,;:!]*", re.I)
# a folder's or file's name, and further ones with spaces in them
_NAMES = r"[^\s\"'<>|]*(?: [^\s/\\\"'<>|]+[/\\][^\s\"'<>|]*)*"
_ADDRESS = r"(?P<address>[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>)\]]*)"
_PATH = (
    r"(?P<path>"
    rf"(?<![A-Za-z0-9])[A-Za-z]:[\\/]{_NAMES}"
    rf"|\\\\[\w.$-]+\\{_NAMES}"
    rf"|(?<![\w<])(?:~\w*|\.{{1,2}}|\$\{{?\w+\}}?|%\w+%)[\\/]{_NAMES}"
    rf"|/(?:home|Users|root|mnt|media|tmp|var|opt|srv|private|workspace)/{_NAMES}"
    rf"|(?<![A-Za-z0-9<])/{{1,2}}[\w.~$-]{_NAMES}"
    r")"
)
_SECRET = (
    r"(?P<secret>"
    # tokens by the prefixes of those who give them out
    r"\b(?:hf|api_org|sk|pk|gh[opsu]|github_pat|glpat|xox[abp]|r8)[_-][\w-]{8,}"
    r"|\bAKIA[0-9A-Z]{12,}|\beyJ[\w-]{10,}(?:\.[\w-]+)*"
    r"|\b(?:token|secret|password|passwd|api[ _-]?key)\"?\s*[:=]\s*\S+"
    r"|\bbearer\s+\S{16,}"
    # letters and digits mixed, longer than a word
    r"|\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{28,}"
    r")"
)
_UNFIT = re.compile(f"{_ADDRESS}|{_PATH}|{_SECRET}", re.I)
_STARTS_WITH_PATH = re.compile(rf"\s*(?:{_PATH})", re.I)


def redact(text: str, *, paths: bool = True) -> str:
    """A text without what looks like a secret, and with `paths` without this machine's paths.

    An address stays where it is a plain one of the web: no query, user or port, and no webhook.
    A line that begins with a path goes as a whole, since nobody can tell where the path ends.
    """

    def cleaned(match: re.Match[str]) -> str:
        kind, found = match.lastgroup, match[0]
        if kind == "path" and not paths:
            return found
        if kind == "address":
            local = not found.lower().startswith(("http://", "https://"))
            safe = _SAFE_ADDRESS.fullmatch(found) and not _hides_secret(found)
            return found if safe or (local and not paths and "@" not in found) else REMOVED
        return REMOVED

    return "\n".join(
        REMOVED if paths and _STARTS_WITH_PATH.match(line) else _UNFIT.sub(cleaned, line)
        for line in text.split("\n")
    )


def _hides_secret(address: str) -> bool:
    return "hook" in address.lower() or re.search(_SECRET, address, re.I) is not None


def is_hub_name(path: str) -> bool:
    """Whether a path is none on this machine, and so may name a repository of the Hub."""
    return (
        not Path(path).expanduser().exists()
        and path.count("/") == 1
        and not path.startswith((".", "/", "~"))
    )


def is_hub_lora(lora: str) -> bool:
    """The same of a LoRA, which may be a file of a repository: `owner/name/<file>`."""
    if Path(lora).expanduser().exists():
        return False
    repository = HUB_LORA.fullmatch(lora)
    # a/b.safetensors is the path of a file, not a repository
    return repository is not None and (
        repository[2] is not None or not repository[1].endswith(".safetensors")
    )


def public_settings(config: DerivedValues) -> dict[str, Any]:
    """The options that the config gives and that may leave this machine, as JSON.

    A config file of these is SimpleTuner's, without the paths that its next user has to fill in.
    """
    values = config.model_dump(mode="json")
    public = {}
    for name, field in type(config).model_fields.items():
        value = values[name]
        if name not in config.model_fields_set or value is None:
            continue
        if name in _REPOSITORIES:
            if is_hub_name(value) and "\\" not in value and redact(value) == value:
                public[name] = value
        elif name in _TEXTS or _holds_no_text(field.annotation):
            public[name] = _cleaned(value, paths=True)
    return public


def shown_settings(config: DerivedValues) -> dict[str, Any]:
    """Every option as JSON for a file of the run's own: its paths stay, its secrets don't."""
    return without_secrets(config.model_dump(mode="json"))


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON without what its keys or its texts say is a secret."""
    return dict(_cleaned(values, paths=False))


def _holds_no_text(annotation: Any) -> bool:
    """Whether values of a type are numbers, switches, or words that the type itself lists."""
    if annotation in (bool, int, float, NoneType, Ellipsis) or get_origin(annotation) is Literal:
        return True
    arguments = get_args(annotation)
    return bool(arguments) and all(map(_holds_no_text, arguments))


def _cleaned(value: Any, *, paths: bool) -> Any:
    if isinstance(value, str):
        return redact(value, paths=paths)
    if isinstance(value, Mapping):
        return {
            redact(key, paths=paths): REMOVED
            if _SECRET_NAME.search(key) and isinstance(inner, str | list | dict)
            else _cleaned(inner, paths=paths)
            for key, inner in value.items()
        }
    return [_cleaned(inner, paths=paths) for inner in value] if isinstance(value, list) else value
