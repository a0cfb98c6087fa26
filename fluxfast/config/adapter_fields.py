"""The options of the adapter that is trained, and of the frozen one beside it.

They are fields of the run's config like all others (`run_fields`).
"""

from typing import Annotated, Literal

from pydantic import Field

from fluxfast.config.adapters import LORA_TYPES, LoraFormat
from fluxfast.config.lycoris import LycorisConfig
from fluxfast.config.option import option
from fluxfast.config.settings import Settings, named_in

LoraTarget = Literal[
    "mmdit", "context", "context+ffs", "all", "all+ffs", "ai-toolkit", "tiny", "nano",
    "all+ffs+embedder", "all+ffs+embedder+controlnet",
]  # fmt: skip

# what several options are only read with
_ASSISTANT = "assistant_lora_path or model_flavour=schnell"


class AdapterFields(Settings):
    """What a config file can say of adapters."""

    assistant_lora_path: str | None = option(None, on_resume="told")
    """Frozen LoRA beside the one that is trained (unset: the flavour's, which schnell has)."""
    assistant_lora_strength: float = option(1.0, gt=0, only_with=_ASSISTANT)
    """What the assistant LoRA's output is multiplied with in training."""
    assistant_lora_inference_strength: float = option(
        0.0, ge=0, only_with=_ASSISTANT, on_resume="ignored"
    )
    """The same at validation."""
    disable_assistant_lora: bool = False
    """Train without an assistant LoRA."""
    lora_type: Annotated[str, named_in(lambda: LORA_TYPES)] = "standard"
    """Kind of adapter; standard is PEFT's LoRA, lycoris what lycoris_config says."""
    lycoris_config: LycorisConfig | None = option(
        "config/lycoris_config.json", only_with="lora_type=lycoris", validate_default=True
    )
    """JSON file of the LyCORIS algorithms and their targets."""
    init_lokr_norm: float | None = option(
        None, gt=0, only_with="lora_type=lycoris", on_resume="start_only"
    )
    """Start LoKrs at this fraction of values like the base's (unset: at zero)."""
    validation_lycoris_strength: float = option(
        1.0, only_with=("lora_type=lycoris", "validation_disable=false"), on_resume="ignored"
    )
    """Factor of LyCORIS adapters while validation images are drawn."""
    lora_rank: int = option(16, ge=1, on_resume="elsewhere")
    """Rank of the LoRA's matrices."""
    lora_alpha: float | None = option(None, gt=0, on_resume="elsewhere")
    """The LoRA's scale is alpha / rank (unset: alpha is the rank)."""
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of dropping an input of the LoRA."""
    lora_init_type: Literal["default", "gaussian", "loftq", "olora", "pissa"] = option(
        "default", on_resume="start_only"
    )
    """How the LoRA's matrices start; loftq corrects a quantised base, in any of its formats."""
    loftq_iterations: int = option(
        1, ge=1, only_with="lora_init_type=loftq", on_resume="start_only", ours=True
    )
    """How often loftq quantises: after the first time with the LoRA taken out of the base."""
    use_dora: bool = option(False, only_with="lora_type=standard", on_resume="elsewhere")
    """Train a magnitude for each row of the weights beside the LoRA (DoRA)."""
    init_lora: str | None = option(None, on_resume="start_only")
    """LoRA file, folder or repository to continue from."""
    lora_format: LoraFormat = option("diffusers", on_resume="ignored")
    """Key layout of the saved LoRA; `adapters/styles.py` says which programs read which."""
    flux_lora_target: LoraTarget = option("all", on_resume="elsewhere")
    """Preset of the modules that get a LoRA."""
    peft_lora_target_modules: tuple[str, ...] | None = option(
        None, min_length=1, on_resume="elsewhere"
    )
    """Module name suffixes in place of the preset: a list, or a JSON file that holds one."""
