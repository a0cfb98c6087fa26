"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # before anything imports triton, which reads it once
    os.environ["TRITON_INTERPRET"] = "1"
