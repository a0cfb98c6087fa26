"""fluxfast: fast, lean FLUX.1 LoRA training."""

__version__ = "0.1.0"
__all__ = ["FluxTransformer", "__version__", "accelerate", "restore"]


def __getattr__(name: str):
    # the model pulls in diffusers; `import fluxfast` alone, and the ops, stay quick without it
    if name == "FluxTransformer":
        from fluxfast.model.transformer import FluxTransformer

        return FluxTransformer
    if name in ("accelerate", "restore"):
        from fluxfast import dropin

        return getattr(dropin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
