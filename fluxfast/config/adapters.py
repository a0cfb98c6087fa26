"""The adapter kinds, by SimpleTuner's words for them.

A new kind is a line here, with the "module:name" of its class, an `AdapterKind` of
`fluxfast.adapters.kind`. The class is imported by `fluxfast.adapters.kinds`, not here.
"""

from typing import Literal, get_args

# the values of the option `lora_type`
LORA_TYPES = {
    "standard": "fluxfast.adapters.lora:LoraKind",
    "lycoris": "fluxfast.adapters.lycoris:LycorisKind",
}
# what `use_dora` makes of "standard"
DORA = "dora"
# what `model_type` "full" makes of every `lora_type`
FULL = "full"
ADAPTER_KINDS = {
    **LORA_TYPES,
    DORA: "fluxfast.adapters.lora:DoraKind",
    FULL: "fluxfast.adapters.full:FullKind",
}

# the option `lora_format`; `fluxfast.adapters.styles` says what each of these is
LoraFormat = Literal["diffusers", "comfyui", "kohya", "lycoris"]
LORA_FORMATS: tuple[str, ...] = get_args(LoraFormat)
