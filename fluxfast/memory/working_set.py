"""What a block keeps for its backward, and what its forward and backward work with: bytes, read off
the blocks' own code.

E is one [B, S, D] tensor of activations, image and text together; `img` and `txt` are the streams'
parts of it. The counts follow `fluxfast.model.single_block` and `fused_double`, line by line: where
those change, these do (`fluxfast-bench vram` compares them with a full-size step's).
"""

from __future__ import annotations

from functools import lru_cache

from fluxfast.memory.sizes import Workload

# E that a policy keeps beside the block's input: packed qkv and MLP input 7, attention's output 1;
# qkv 3, attention's output 1, the stream after it 1, MLP input 4
KEPT_SINGLE = {"none": 8, "selective": 1, "full": 0}
KEPT_DOUBLE = {"none": 9, "selective": 1, "full": 0}
ACTIVATION = 2


@lru_cache(maxsize=4096)
def saved_bytes(workload: Workload, index: int, policy: str, input_elsewhere: bool = False) -> int:
    """What a block's forward leaves for its backward; `input_elsewhere`: its input is in host
    memory.
    """
    rows, e = _rows(workload, index)
    double = index < workload.sizes.num_layers
    kept = (KEPT_DOUBLE if double else KEPT_SINGLE)[policy] * e
    if policy != "full":
        # log-sum-exp in fp32, and the narrow halves of the last linears' adapters
        kept += rows * (
            4 * workload.sizes.num_attention_heads + ACTIVATION * workload.kept_per_token
        )
    if policy == "none":
        kept += rows * ACTIVATION * workload.kept_per_token * (5 if double else 4)
    # what "none" keeps shares memory with the input, which stays
    return kept + (0 if input_elsewhere and policy != "none" else e)


@lru_cache(maxsize=4096)
def forward_bytes(workload: Workload, index: int) -> int:
    """What is alive at most during a block's forward, beside weights, its input, and what the
    blocks before it keep.
    """
    _, e = _rows(workload, index)
    txt = _text_bytes(workload)
    c, codes = _forms(workload)
    # x_in c, qkv 3, q k v 3, attn 1 and its codes, x1 1, mlp_in c, h 4, ff2_in 4c; the image's
    # result, the text's with its last product
    double = (12 + 6 * c + codes / 4) * e + (e - txt) + 2 * txt
    # x_in c, y 7, q k v 3, attn 1, last_in 5c, the last product and the result
    most = round(double if index < workload.sizes.num_layers else (13 + 6 * c) * e)
    return most + _scratch(workload, index) + _small(workload, index, "full")


@lru_cache(maxsize=4096)
def backward_bytes(
    workload: Workload, index: int, policy: str, input_elsewhere: bool = False
) -> int:
    """What is alive at most during a block's backward, beside weights, gradients of adapters, and
    what blocks keep.
    """
    _, e = _rows(workload, index)
    moments = _double_moments if index < workload.sizes.num_layers else _single_moments
    # an input that was put aside, and that of the block before it on its way
    put_aside = 2 * e if input_elsewhere and policy != "none" else 0
    return max(moments(workload, index, policy)) + _small(workload, index, policy) + put_aside


def _small(workload: Workload, index: int, policy: str) -> int:
    """Norms' statistics and reciprocal RMS of q and k in fp32, a log-sum-exp, adapters' narrow
    halves, RoPE's tables.
    """
    rows, _ = _rows(workload, index)
    double, heads = index < workload.sizes.num_layers, workload.sizes.num_attention_heads
    a_row = (
        4 * 2 * (2 if double else 1)
        + 4 * 2 * heads
        + ACTIVATION * workload.kept_per_token * (6 if double else 5)
    )
    if policy == "full":
        a_row += 4 * heads
    return rows * a_row + max(workload.tokens) * workload.sizes.attention_head_dim * 4


def _rows(workload: Workload, index: int) -> tuple[int, int]:
    rows = workload.batch * workload.tokens[index]
    return rows, rows * workload.sizes.dim * ACTIVATION


def _text_bytes(workload: Workload) -> int:
    return workload.batch * workload.text_tokens * workload.sizes.dim * ACTIVATION


def _forms(workload: Workload) -> tuple[float, float]:
    """E of a product's input of 1 E as backward keeps it: values, or codes alone; and of the codes
    beside a gradient of 4 E.
    """
    return (1.0, 0.0) if workload.compute == "same" else (0.5, 2.0)


def _single_moments(workload: Workload, index: int, policy: str) -> list[int]:
    rows, e = _rows(workload, index)
    c, codes = _forms(workload)
    there = 8 if policy == "none" else 1 if policy == "selective" else 0
    # attention's backward sums dq up in fp32
    accumulator = 2 * e + 4 * rows * workload.sizes.num_attention_heads
    # dout 1, x_in c, y 7, q k v 3, attn 1, last_in 5c, dbranch 1 and its codes, dlast 5
    last = (18 + 6 * c + codes / 4 - there) * e + _turned(workload, 5)
    # dout 1, x_in c, y 7 (its gradient's place, or another 7), q k v 3, attn 1, dlast 5, codes of
    # dh, dq dk dv 3
    attention = (20 + c + codes - there + (7 if policy == "none" else 0)) * e + accumulator
    return [round(moment) + _scratch(workload, index) for moment in (last, attention)]


def _double_moments(workload: Workload, index: int, policy: str) -> list[int]:
    _, e = _rows(workload, index)
    txt = _text_bytes(workload)
    img = e - txt
    c, codes = _forms(workload)
    there = 9 if policy == "none" else 1 if policy == "selective" else 0
    # dout 1, x_in c, qkv 3, q k v 3, attn 1 and its codes
    base = (8 + c + codes / 4) * e
    # of a stream: x1 1, mlp_in c, h 4, ff2_in 4c; dbranch 1 and its codes, dff2 4
    mlp, grads = 5 + 5 * c, 5 + codes / 4
    kept_mlp = 5 if policy == "none" else 0
    kept_base = (there - kept_mlp) * e
    image = base - kept_base + (mlp - kept_mlp) * e + grads * img
    # the image's dx1 and dattn are there by then; its own are gone
    text = base - kept_base + 2 * img + (mlp - kept_mlp + grads) * txt
    # the text's second MLP linear is decoded only for the text
    text_ff2 = 4 * workload.sizes.dim**2 * _scratch_itemsize(workload)
    whole = _scratch(workload, index) + _turned(workload, 4)
    return [round(image) + whole - text_ff2, round(text) + whole]


def _turned(workload: Workload, width: int) -> int:
    """The codes of a weight [dim, width · dim] turned round, which Hopper's 8-bit products want in
    backward.
    """
    return 0 if workload.compute == "same" else width * workload.sizes.dim**2


def _scratch_itemsize(workload: Workload) -> int:
    """Bytes an element of weights that are decoded, or turned into codes, for the products."""
    if workload.compute == "same":
        return 0 if workload.storage.format is None else ACTIVATION
    same_codes = {"int8": "int8", "e4m3": "fp8_e4m3"}[workload.compute]
    return 0 if workload.storage.format == same_codes else 1


def _scratch(workload: Workload, index: int) -> int:
    """A block's weights as its products read them, where that is not how they are stored; alive for
    one direction.
    """
    linears = (linear for linear in workload.sizes.block_linears(index) if not linear.is_modulation)
    return sum(linear.in_features * linear.out_features for linear in linears) * _scratch_itemsize(
        workload
    )
