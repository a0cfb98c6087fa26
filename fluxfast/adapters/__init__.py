"""What is trained on top of the frozen transformer, and the files that hold it.

`kind.AdapterKind` is what the rest of fluxfast asks of a kind of adapter, `kinds` has the kinds
that there are, `presets` the modules that they sit on. LoRA is the kind in the `lora*` modules.

Files are read and written whatever the kind: `algorithms` is what their tensors mean,
`adapter_keys` and `adapter_read` take them in the spellings of many programs, `styles` and
`writing` write them.
"""
