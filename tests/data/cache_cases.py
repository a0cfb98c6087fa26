"""Entries for the tests of the tensor cache."""

import torch


def tensors(seed=0, size=7):
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(16, 3, size, generator=g).to(torch.bfloat16),
        "mask": torch.rand(size, generator=g) > 0.5,
        "scalar": torch.tensor(float(seed)),
        "strided": torch.randn(size, 4, generator=g).T,
        "none": torch.empty(0, 3),
    }


def same(a, b):
    return (
        a is not None
        and a.keys() == b.keys()
        and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)
    )


def blob(cache):
    (path,) = cache.folder.glob("*.safetensors")
    return path
