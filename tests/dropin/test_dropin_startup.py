"""`python -m fluxfast.dropin` runs a trainer that nobody has edited, with the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxfast.dropin import startup
from fluxfast.dropin.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
import os, sys
# what torch reads when it is imported may be set by a script, before that
assert "torch" not in sys.modules
import json, pathlib
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from support import SMALL, make_inputs, randomise

model = FluxTransformer2DModel(**SMALL)
randomise(model)
model.requires_grad_(False)
inputs = make_inputs(1, 3, 4, guidance=False)
with torch.no_grad():
    model(**inputs)
torch.manual_seed(3)
model.add_adapter(LoraConfig(r=3, target_modules=["to_q", "proj_out"], init_lora_weights=False))
if "hook" in sys.argv:
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
called = torch.compile(model, backend="eager") if "compile" in sys.argv else model
if "compile blocks" in sys.argv:
    model.compile_repeated_blocks(backend="eager")
trained = [p for p in model.parameters() if p.requires_grad]
optimizer, losses = torch.optim.SGD(trained, lr=0.1), []
for _ in range(2):
    loss = called(**inputs).sample.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
pathlib.Path(os.environ["LOSSES"]).write_text(json.dumps([losses, sys.argv[1:], __name__]))
"""
PARENT = """
import subprocess, sys
raise SystemExit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""


@pytest.fixture
def run(tmp_path):
    """Run Python with some words in the folder of the trainer; returns its losses and errors."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "parent.py").write_text(PARENT)

    def run(*words, code=0, **more):
        found = os.pathsep.join(str(ROOT / each) for each in ("", "kernels", "tests"))
        own = {"PYTHONPATH": found, "LOSSES": str(tmp_path / "losses.json"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=os.environ | own | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        if code:
            return None, done.stderr
        return json.loads((tmp_path / "losses.json").read_text()), done.stderr

    return run


def test_a_script_trains_as_it_does_alone_and_the_report_says_how(run):
    plain, errors = run("trainer.py", "a", "--b=1")
    assert "fluxfast" not in errors
    (losses, *rest), errors = run("-m", "fluxfast.dropin", "trainer.py", "a", "--b=1")
    # fp32, two orders of summation
    assert losses == pytest.approx(plain[0], rel=1e-5) and losses[0] != losses[1]
    assert rest == plain[1:] == [["a", "--b=1"], "__main__"]
    # when the transformer has its adapters, and in the end
    lines = [line for line in errors.splitlines() if line.startswith("fluxfast: diffusers layout")]
    assert len(lines) == 2
    assert "5 of 5 blocks can run fused; 5 of 5 calls did" in lines[0]
    assert "5 of 5 blocks can run fused; 15 of 15 calls did" in lines[1]


@pytest.mark.parametrize("how", ["compile", "compile blocks"])
def test_a_script_that_compiles_gets_what_it_gets_alone(run, how):
    (plain, _, _), _ = run("trainer.py", how)
    (losses, _, _), errors = run("-m", "fluxfast.dropin", "trainer.py", how)
    assert losses == pytest.approx(plain, rel=1e-5)
    # the calls before it was compiled
    assert "5 of 5 calls did" in errors and "5 blocks compiled" in errors


@pytest.mark.parametrize("words", [["parent.py", "trainer.py"], ["-m", "parent", "trainer.py"]])
def test_programs_that_the_trainer_starts_do_the_same(run, words):
    (losses, _, _), errors = run("-m", "fluxfast.dropin", *words)
    assert losses[0] != losses[1] and "15 of 15 calls did" in errors


def test_strict_makes_a_call_by_the_host_an_error(run):
    words = ["-m", "fluxfast.dropin", "trainer.py", "hook"]
    (losses, _, _), errors = run(*words)
    assert losses and "it has hooks" in errors
    _, errors = run(*words, code=1, FLUXFAST_STRICT="1")
    assert "accelerate(strict=True)" in errors and "it has hooks" in errors


def test_words_that_name_no_script(capsys, tmp_path):
    assert main([]) == 2 and main(["-m"]) == 2
    assert main([str(tmp_path / "no.py")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("usage: python -m fluxfast.dropin") == 3 and "there is no" in errors
    assert main(["--help"]) == 0 and "FLUXFAST_STRICT" in capsys.readouterr().out


def test_a_sitecustomize_that_is_hidden_is_imported_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    env = startup.environment(
        {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.modules['sitecustomize'].__file__)"],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["theirs", str(tmp_path / "sitecustomize.py")]
    assert not done.stderr
