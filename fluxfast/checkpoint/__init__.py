"""Reading FLUX.1's transformer from safetensors files, and writing it quantised or changed.

`opening` turns a name (file, folder, hub repository) into a `Checkpoint` (`transformer`), which is
loaded, checked, quantised, or written with other weights. Below these: `locate` finds the files,
`keys` knows how each program names the tensors, `reader` and `writer` move tensors one at a time,
`tensor_stream` checks, decodes and quantises them on the way, `weights` gives them as numbers by
the model's names, `empty_model` is what they fill, `side_by_side` is how they lie in it.
`quantized` and `checksums` are what a quantised file says of itself. `not_safetensors` and
`not_flux` word the refusals.

Only `.safetensors` content is read. A model class is an argument here: `fluxfast.model` imports
this package, never the other way round.
"""

# the key in a file's metadata under which a quantised transformer says what it is; here, where it
# is found without importing torch
QUANTIZED = "fluxfast_quantized"
