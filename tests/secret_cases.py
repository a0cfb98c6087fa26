"""Secrets and paths in every field of a config that takes a text."""

from typing import Any, get_args

from fluxfast.config.run import TrainConfig

SECRETS = {
    "token": "hf_QwErTyUiOpAsDfGhJkLzXcVbNm12345678",
    "webhook": "https://discord.com/api/webhooks/123/abcDEF-secretpart",
    "login": "https://jane:hunter2@example.org/x",
    "key": "0123456789abcdef0123456789abcdef01234567",
}
PATHS = {
    "home": "/home/jane/Private Pictures/cat.png",
    "file": "file:///srv/jane/secret.json",
    "windows": "C:\\Users\\Jane Doe\\secret\\cat.png",
    "share": "\\\\nas\\jane\\secret",
    "tilde": "~/jane/secret",
    "bucket": "s3://jane-bucket/secret",
    "variable": "$HOME/jane/secret",
}
HIDDEN = ("QwErTy", "secretpart", "hunter2", "0123456789abc", "jane", "Jane", "Pictures", "secret")


def full_of(unfit: str) -> dict[str, Any]:
    """A config that holds a text in every field that takes any text."""
    texts = {}
    of_a_table = ("attention_mechanism", "optimizer", "lora_type", "model_flavour", "hub_model_id")
    for name, field in TrainConfig.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if str in kinds and name not in of_a_table:
            texts[name] = f"a cat, {unfit}" if "prompt" in name or "note" in name else unfit
    not_texts = {"validation_resolution", "vram_budget", "resume_from_checkpoint", "report_to"}
    return {name: text for name, text in texts.items() if name not in not_texts}
