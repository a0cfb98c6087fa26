"""Small checkpoints of every kind for the tests of this folder."""

import torch
from safetensors.torch import save_file

from bfl_reference import BflFlux
from fluxfast import FluxTransformer
from fluxfast.checkpoint.keys import COMFY_PREFIX
from fluxfast.checkpoint.opening import open_folder, open_single_file
from support import SMALL, randomise

CONFIG = SMALL | {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}

BFL = {
    "in_channels": 16,
    "dim": 64,
    "n_heads": 2,
    "depth": 1,
    "depth_single": 2,
    "context": 24,
    "pooled": 20,
}

SOURCES = ("folder", "sharded", "diffusers", "bfl", "comfy")


def bfl_model():
    """BFL's own model, small and with guidance, as CONFIG describes it."""
    torch.manual_seed(0)
    return BflFlux(**BFL, axes=(4, 14, 14), guidance=True)


def make_model(dtype=torch.bfloat16):
    model = FluxTransformer(**CONFIG)
    randomise(model)
    return model.to(dtype)


def save_source(root, kind, dtype=torch.bfloat16):
    """A checkpoint of one of the kinds in SOURCES; returns its path."""
    if kind in ("bfl", "comfy"):
        prefix = COMFY_PREFIX if kind == "comfy" else ""
        save_file(
            {
                prefix + name: tensor.to(dtype).contiguous()
                for name, tensor in bfl_model().state_dict().items()
            },
            root / "flux.safetensors",
        )
        return root / "flux.safetensors"
    model = make_model(dtype)
    if kind == "diffusers":
        save_file(model.state_dict(), root / "flux.safetensors")
        return root / "flux.safetensors"
    model.save_pretrained(root / "flux", max_shard_size="50KB" if kind == "sharded" else "10GB")
    return root / "flux"


def open_source(path):
    return open_folder(path) if path.is_dir() else open_single_file(path)


def load(path, **kwargs):
    return (FluxTransformer.from_pretrained if path.is_dir() else FluxTransformer.from_single_file)(
        path, **kwargs
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def leftovers(target):
    """The names of the files beside `target`."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)
