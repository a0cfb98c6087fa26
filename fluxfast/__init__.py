"""fluxfast: fast, lean FLUX.1 LoRA training."""

__version__ = "0.1.0"
