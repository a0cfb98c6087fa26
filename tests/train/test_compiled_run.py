"""`dynamo_backend` in a run: the same LoRA as without, what is told, what the next run finds."""

import io
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from drawing_cases import DRAWS_TRAINED
from rich.console import Console
from safetensors.torch import load_file
from test_trainer import BF16, FP32, TREAD

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.model.compiled import CACHE_VARIABLE
from fluxfast.train import compiling
from fluxfast.train.compiling import CompileProgress
from fluxfast.train.trainer import train
from support import relative_error

# Six steps of Adam with a rate of 1e-3, whose first update is the gradient's sign: where a gradient
# is near zero, rounding decides the sign, and single values of B are off by the whole update
ROUNDING = 2e-2
STREAMED = {"enable_group_offload": True, "group_offload_blocks_per_group": 1}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    # a run sets it for the process
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    os.environ.pop(CACHE_VARIABLE, None)


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    "mode",
    [
        FP32 | {"dynamo_fullgraph": True, "max_train_steps": 3},
        BF16 | TREAD | {"base_model_precision": "nf4-bnb"},
        BF16 | STREAMED | {"flux_attention_masked_training": True},
        FP32 | {"dynamo_use_regional_compilation": True},
    ],
    ids=["plain", "nf4-tread", "streamed-masked", "blocks"],
)
def test_a_compiled_run_is_the_same_run(run, tmp_path, mode):
    plain, _ = run(**mode | {"name": "plain", "lora_dropout": 0.0})
    backend = "inductor" if "dynamo_fullgraph" in mode else "aot_eager"
    compiled, out = run(
        **mode | {"name": "compiled", "lora_dropout": 0.0, "dynamo_backend": backend}
    )
    assert f"torch.compile ({backend}) of " in out.getvalue()
    assert "torch.compile: the first steps compile" in out.getvalue()
    assert out.getvalue().count("graphs in") == 1, "steps after the first compiled something"
    # the same sums in another order, in fp32 on a CPU
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    expected, actual = load_file(plain), load_file(compiled)
    assert expected.keys() == actual.keys()
    for name, values in expected.items():
        assert relative_error(actual[name].float(), values.float()) < ROUNDING, name


PROGRAM = """
import sys, torch
from rich.console import Console
from torch._dynamo.utils import counters
from fluxfast.config.run import load_config
from fluxfast.train.trainer import train
train(load_config(sys.argv[1]), Console(quiet=True))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def test_the_next_run_finds_what_was_compiled(write_config, tmp_path):
    found = []
    for name in ("first", "second"):
        path = write_config(
            **FP32,
            name=name,
            dynamo_backend="inductor",
            max_train_steps=1,
            cache_dir=str(tmp_path / "cache"),
        )
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )
        found.append([int(word) for word in done.stdout.split()[-2:]])
    (_, missed), (hits, missed_again) = found
    assert missed > 0 and hits == missed and missed_again == 0
    assert any((tmp_path / "cache" / "compiled").rglob("*.so"))


def test_an_order_that_this_machine_can_not_follow(write_config, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config(write_config(dynamo_backend="inductor"))
    with pytest.raises(ConfigError, match="no-such-compiler"):
        train(config, Console(file=io.StringIO()))
    config = load_config(write_config(validation_torch_compile=True, **DRAWS))
    with pytest.raises(ConfigError, match="validation_torch_compile"):
        train(config, Console(file=io.StringIO()))


DRAWS = DRAWS_TRAINED | {
    "validation_resolution": "64", "validation_num_inference_steps": 2, "max_train_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("trains_compiled", [False, True])
@pytest.mark.parametrize("draws_compiled", [False, True])
def test_what_is_compiled_in_training_and_in_validation(
    trainer, monkeypatch, trains_compiled, draws_compiled
):
    made = trainer(
        **FP32,
        **DRAWS,
        dynamo_backend="aot_eager" if trains_compiled else "no",
        validation_torch_compile=draws_compiled,
    )
    seen = []
    monkeypatch.setattr(
        type(made.parts.validator),
        "_run",
        lambda self, *args: seen.append(self._transformer.compiled),
    )
    before = made.transformer.compiled
    assert (before is not None) == trains_compiled
    made.parts.validator.run(1, Console(quiet=True))
    assert (seen[0] is not None) == draws_compiled and made.transformer.compiled is before
    if trains_compiled and draws_compiled:
        assert seen[0] is before


def test_compiling_that_takes_long_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(compiling, "INTERVAL", 0.02)
    progress = CompileProgress(told.append, "a folder")
    try:
        progress.tell()
        assert not told
        args = SimpleNamespace()
        progress._on_start(args)
        until = time.monotonic() + 10
        while not any("still compiling: 0 graphs done" in line for line in told):
            assert time.monotonic() < until
            time.sleep(0.01)
        progress._on_end(args)
        progress.tell()
        assert "a folder" in told[0] and told[-1].startswith("compiled 1 graph in ")
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
        progress.tell()
        assert told[-1].startswith("compiled 1 graph in ")
        before = len(told)
    finally:
        progress.close()
    progress.close()
    torch.compile(lambda x: x + 2, backend="eager")(torch.ones(3))
    progress.tell()
    assert len(told) == before
