"""fluxfast's Triton kernels, one op a file; they import torch and Triton, and nothing else.

`launch` has block sizes as data and the function that launches every kernel, `matmul` the matrix
product that other files build on, and `aot` compiles kernels for GPUs that need not be there.
"""
