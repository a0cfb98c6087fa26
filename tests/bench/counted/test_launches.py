"""The kernels that a step launches, recorded from a shallow model and compiled without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fluxfast_bench.counted import prewarm
from fluxfast_bench.counted.compilers import Compilers
from fluxfast_bench.counted.launches import Launch, Pointer
from fluxfast_bench.main import main
from fluxfast_bench.report import results

ROOT = Path(__file__).resolve().parents[3]
# in a process of its own: under the interpreter there is no JIT
RECORD = """
import json, torch
from fluxfast_bench.counted import mock_gpu
from fluxfast_bench.shapes import SHAPES
from fluxfast_bench.counted.launches import compile_launch, compiled
from fluxfast_bench.counted.meta_step import fluxfast_model, forward_backward, inputs_of, recorded
from fluxfast_bench.counted.prewarm import OURS, launches_of
from fluxfast_kernels import gelu
from fluxfast_kernels.aot import compile_ahead, record_variants

shape, same, bf16 = SHAPES["512px-b1"], {}, torch.bfloat16
for format, compute in ((None, "same"), ("int8", "int8"), ("nf4", "int8")):
    of = [recorded(lambda: forward_backward(fluxfast_model(s, adapters=bf16, format=format,
                                                           compute=compute),
                                            inputs_of(s))) for s in (shape, shape.shallow())]
    same[str(format)] = [len(of[0]), set(of[0]) == set(of[1]),
    sum(of[0].values()) > 10 * sum(of[1].values())]

meta = torch.empty(1, 64, 12288, dtype=torch.bfloat16, device="meta")
(launch,) = recorded(lambda: gelu.gelu_fwd(meta, out="int8"))
variants = {(v.name, v.targets): v for v in record_variants(gelu.aot_cases())}
variant = variants["gelu_fwd-bfloat16-int8", ("sm_90",)]
mock_gpu.activate("sm_90")
jit = compiled(launch)
broken = compile_launch(type(launch)(launch.module, launch.kernel, launch.args[1:], launch.numbers))
library = launches_of(OURS["fluxfast+library"], shape, "full", "sm_90")
fused = launches_of(OURS["fluxfast"], shape, "full", "sm_90")
print(json.dumps({
    "same": same, "text": str(launch), "broken": broken, "binary": len(jit.asm["cubin"]),
    "options": [jit.metadata.num_stages, jit.hash, compile_ahead(variant, "sm_90").hash],
    "engines": ["matmul_kernel" in {l.kernel for l in of} for of in (library, fused)],
}))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    env = os.environ | {
        "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "bench")),
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", RECORD], env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_a_shallow_model_launches_what_a_deep_one_does(recorded):
    for count, same, deep in recorded["same"].values():
        # many kernels come twice, for a double block's two parts and for one part
        assert 30 < count < 70 and same and deep


def test_what_is_compiled_ahead_is_what_the_jit_asks_for(recorded):
    stages, jit, ahead = recorded["options"]
    # Triton's own default, which the launcher does not name
    assert stages == 3 and jit == ahead
    assert recorded["binary"] > 1000


def test_a_kernel_that_does_not_compile_says_so(recorded):
    assert recorded["broken"]["reason"] and recorded["broken"]["seconds"] >= 0


def test_an_engine_is_the_contestants_own(recorded):
    library, fused = recorded["engines"]
    assert fused and not library


LAUNCHES = [Launch("m", f"k{i}", (Pointer(torch.bfloat16), i), ()) for i in range(3)]


@pytest.mark.parametrize(
    ("found", "status"), [({"seconds": 1.0}, 0), ({"seconds": 1.0, "reason": "no"}, 1), (None, 1)]
)
def test_the_command_stores_each_kernel(tmp_path, monkeypatch, capsys, found, status):
    monkeypatch.setattr(prewarm, "launches_of", lambda *_: set(LAUNCHES))
    monkeypatch.setattr(Compilers, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Compilers, "__exit__", lambda self, *_: None)
    monkeypatch.setattr(
        Compilers, "each", lambda self, function, items: ((item, found) for item in items)
    )
    assert main(["prewarm", "--results", str(tmp_path), "--jobs", "1"]) == status
    (stored,) = results.read_all(tmp_path)
    assert [r["contestant"] for r in stored.records] == [f"k{i}(bfloat16, {i})" for i in range(3)]
    assert ("k1(bfloat16, 1): " in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--contestants", "diffusers"], "got 'diffusers'"),
        (["--target", "sm_70"], "--target: expected one of sm_80,"),
        (["--jobs", "0"], "--jobs: expected 1 or more, got 0"),
    ],
)
def test_bad_requests(options, said, capsys):
    assert main(["prewarm", *options]) == 1
    assert said in capsys.readouterr().err
