"""What other programs' modules compute, read from their structure and not by import.

`adapters` reads what trainers put on a linear by replacing its forward, with a function for each
trainer in `lora`; `linears` and `weights` read frozen weights that trainers or their libraries have
quantised, and `comfyui` tells which of ComfyUI's modules are plain. `code_names` is how each looks
at what the code of a forward uses: one that names something new is called as it is, since it may do
more.
"""
