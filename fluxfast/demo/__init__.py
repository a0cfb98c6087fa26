"""The demo's model and data: a small pipeline in FLUX.1's form, and photographs to train on."""
