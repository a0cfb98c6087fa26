"""What needs no GPU: launches, bytes and memory of a step on meta tensors, and kernels compiled ahead."""
