"""The adapter kinds, by SimpleTuner's words for them: the values of the option `lora_type`.

A new kind is a line here, with the "module:name" of its class, an `AdapterKind` of
`fluxfast.adapters.kind`. The class is imported by `fluxfast.adapters.kinds`, not here.
"""

LORA_TYPES = {
    "standard": "fluxfast.adapters.lora:LoraKind",
    "lycoris": "fluxfast.adapters.lycoris:LycorisKind",
}
