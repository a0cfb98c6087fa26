"""What needs no GPU: launches, bytes and memory of a step, and kernels compiled ahead."""
