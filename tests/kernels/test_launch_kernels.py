"""Launch numbers, and the variants that are recorded from the launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fluxfast_kernels import launch as launch_module
from fluxfast_kernels.launch import (
    ROW_LAUNCH,
    arch_key,
    cdiv,
    launch_numbers,
    next_pow2,
    row_numbers,
)

# in a process of its own: under the interpreter nothing is recorded
RECORD = """
import importlib, json
import torch
from fluxfast_kernels.aot import record_variants
from fluxfast_kernels.gated_residual import gated_residual_bwd, gated_residual_fwd
from fluxfast_kernels.gelu import gelu_bwd, gelu_fwd
from fluxfast_kernels.modulated_layer_norm import modulated_layer_norm_bwd, modulated_layer_norm_fwd
from fluxfast_kernels.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from fluxfast_kernels.row_quant import row_quant
from fluxfast_kernels.token_route import token_gather, token_scatter

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def step(tokens, text):
    kept = tokens // 2 + 1
    x, mod, mean = meta(1, tokens, 3072), meta(1, 9216), meta(1, tokens, dtype=torch.float32)
    shift, scale, gate = mod.chunk(3, -1)
    modulated_layer_norm_fwd(x, scale, shift, out="int8")
    modulated_layer_norm_bwd(x, x, scale, mean, mean, modulation=True)
    gated_residual_fwd(x, gate, x)
    gated_residual_bwd(x, gate, x)
    gelu_fwd(meta(1, tokens, 12288), out="int8", prefix=x)
    gelu_bwd(meta(1, tokens, 12288), meta(1, tokens, 12288))
    row_quant(meta(tokens, 9216), "int8")
    token_gather(x, meta(1, kept, dtype=torch.int64))
    token_scatter(x, meta(1, kept, 3072), meta(1, tokens, dtype=torch.int32))
    weights, table = meta(4, 128, dtype=torch.float32), meta(9999, 64, dtype=torch.float32)
    index = meta(1, text + tokens, dtype=torch.int32)
    qkv, txt_qkv = meta(1, tokens, 9216), meta(1, text, 9216)
    out = qk_norm_rope_fwd(qkv, weights, table, table, heads=24, txt_qkv=txt_qkv, index=index)
    qk_norm_rope_bwd(out.q, out.k, out.v, out.rstd, weights, table, table, s_txt=text, q=out.q,
    k=out.k, index=index)

ops = ("row_quant", "modulated_layer_norm", "qk_norm_rope", "gelu", "gated_residual", "token_route",
"optim")
cases = {op: importlib.import_module(f"fluxfast_kernels.{op}").aot_cases() for op in ops}
variants = {op: [(v.name, v.targets) for v in record_variants(of)] for op, of in cases.items()}
counts = [(1, 512), (63, 17), (1000, 512), (1024, 512), (4096, 1)]
steps = [record_variants([("", lambda: step(*count), ("sm_90",))]) for count in counts]
def plain(v):
    return v.name, dict(v.signature), sorted(v.constexprs.items(), key=str), v.divisible

steps = [[plain(v) for v in step] for step in steps]
print(json.dumps({"variants": variants, "steps": steps}, default=str))
"""


@pytest.fixture(scope="module")
def recorded():
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    kernels = Path(__file__).parents[2] / "kernels"
    process = subprocess.run(
        [sys.executable, "-c", RECORD],
        env=env | {"PYTHONPATH": str(kernels)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_every_op_has_variants_for_every_target(recorded):
    for op, variants in recorded["variants"].items():
        keys = [(name, *targets) for name, targets in variants]
        assert len(keys) == len(set(keys)), op
        assert {target for _, target in keys} == {"sm_80", "sm_89", "sm_90", "gfx942", "gfx1100"}, (
            op
        )
        # sm_80 has no e4m3
        assert not any("e4m3" in name for name, target in keys if target == "sm_80")


def test_token_counts_share_their_kernels(recorded):
    first, *others = recorded["steps"]
    assert len(first) == 11
    for other in others:
        assert other == first


def test_row_numbers():
    for op in ROW_LAUNCH:
        for width in (1, 96, 3072, 12288, 15360, 21504):
            for arch in ("default", "sm_90", "gfx942"):
                numbers = row_numbers(op, width, arch)
                assert (
                    numbers["BLOCK"] == next_pow2(numbers["BLOCK"]) and numbers["BLOCK"] < 2 * width
                )
                assert 1 <= numbers["num_warps"] <= (16 if arch == "gfx942" else 32)


def test_helpers():
    assert [next_pow2(n) for n in (1, 2, 3, 3072, 4096)] == [1, 2, 4, 4096, 4096]
    assert [cdiv(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert arch_key(torch.device("cpu")) == "default"
    table = {"default": {"BLOCK": 1}, "sm_90": {"BLOCK": 2}}
    assert launch_numbers(table, torch.device("cpu")) == {"BLOCK": 1}


def test_engines_cover_every_number_of_tokens():
    device = torch.device("cpu")
    for kind, table in launch_module.WIDE_ENGINES.items():
        known = {"library", "augmented", "fused"} if kind == "float" else {"codes", "decode"}
        for rows in table.values():
            bounds = [most for most, _ in rows]
            assert (
                bounds[-1] is None
                and bounds[:-1] == sorted(bounds[:-1])
                and {name for _, name in rows} <= known
            )
        for tokens in (0, 1, 64, 65, 4608):
            assert launch_module.wide_engine(kind, tokens, device) in known
    assert [launch_module.wide_engine("int8", tokens, device) for tokens in (64, 65)] == [
        "codes",
        "decode",
    ]
