"""Pairs of `host_of_comfyui` and the tolerances of what is computed with it."""

import copy

import torch
from host_comfyui_ops import Linear
from host_of_comfyui import ComfyFlux

from support import randomise

# fp32: two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5
# 2^-8 a rounding, over every op of five blocks, of which the host rounds each
BF16 = 2e-2


def hosts(linear=Linear, **options):
    torch.manual_seed(0)
    host = ComfyFlux(linear, **options)
    randomise(host)
    for name, p in host.named_parameters():
        if "_norm." in name:
            p.data.abs_().add_(0.5)
    return host, copy.deepcopy(host)
