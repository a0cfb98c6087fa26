"""What can't go with full training (`model_type` "full"), where the transformer itself trains."""

from fluxfast.config.derived import DerivedValues
from fluxfast.config.settings import quoted

# options that say what an adapter is like, what it starts from, or which others are beside it
_OF_ADAPTERS = (
    "lora_type", "use_dora", "lora_rank", "lora_alpha", "lora_dropout", "lora_init_type",
    "init_lora", "init_lora_ema", "lora_format", "flux_lora_target", "peft_lora_target_modules",
    "assistant_lora_path", "validation_adapter_path", "validation_adapter_config",
)  # fmt: skip

_ASKED = '"model_type" is full'


def full_training_problems(config: DerivedValues) -> list[str]:
    """A line for what the config asks for and full training can't have; none in other runs."""
    if not config.trains_all:
        return []
    return [*_adapter_problems(config), *_base_problems(config), *_not_yet(config)]


def _adapter_problems(config: DerivedValues) -> list[str]:
    problems = []
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    given = [name for name in _OF_ADAPTERS if getattr(config, name) != defaults[name]]
    if given:
        are = "is an option" if len(given) == 1 else "are options"
        problems.append(
            f"{quoted(given)} {are} of adapters, and {_ASKED}, which trains the transformer "
            f'without one: remove {"it" if len(given) == 1 else "them"}, or set "model_type": '
            '"lora"'
        )
    elif config.assistant_lora is not None:
        problems.append(
            f"{_ASKED}, and no assistant LoRA can be beside that, as "
            f'"model_flavour" {config.model_flavour} has one ({config.assistant_lora}): set '
            '"disable_assistant_lora": true to train without it'
        )
    return problems


def _base_problems(config: DerivedValues) -> list[str]:
    """What takes the base for frozen."""
    problems = []
    if config.base_model_precision != "no_change":
        problems.append(
            f"{_ASKED}, and rounded weights can't be trained: "
            f'"base_model_precision" is {config.base_model_precision}; set it to "no_change"'
        )
    frozen_only = {
        "enable_group_offload": (
            config.enable_group_offload,
            "blocks are not streamed, since the update needs all of them",
        ),
        "vram_budget": (
            config.vram_budget is not None,
            'it would stream blocks; "gradient_checkpointing": true lowers the memory',
        ),
        "modulation_ahead": (
            config.modulation_ahead is True,
            "modulation changes with each step",
        ),
        "cuda_graphs": (config.cuda_graphs is True, "only fused blocks are captured"),
        "compute_precision": (
            config.compute_precision not in ("auto", "same"),
            "products are in the weights' type or mixed_precision's",
        ),
        "recompute": (
            "selective" in (config.recompute or ()),
            'blocks that train recompute all or nothing: "full" or "none"',
        ),
    }
    for name, (asked, why) in frozen_only.items():
        if asked:
            problems.append(
                f'"{name}" is {_told(getattr(config, name))}, and {_ASKED}: {why}; leave it out'
            )
    return problems


def _not_yet(config: DerivedValues) -> list[str]:
    """What would make sense, and is not there yet."""
    problems = []
    for name, asked in (
        ("push_to_hub", config.push_to_hub),
        ("dynamo_backend", config.dynamo_backend != "no"),
    ):
        if asked:
            problems.append(
                f'"{name}" is {_told(getattr(config, name))}, and {_ASKED}: not implemented yet '
                "together; leave it out"
            )
    return problems


def _told(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
