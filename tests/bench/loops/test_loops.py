"""`fluxfast-bench loops`: a trainer's script by itself, and by `python -m fluxfast.dropin`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxfast_bench.loops import bfl_files, loops, tiny
from fluxfast_bench.loops.loop import PACKAGES, Loop, measure, versions_in
from fluxfast_bench.main import main
from fluxfast_bench.report import trainers_sections
from fluxfast_bench.report.results import Result, read_all

# a trainer: PEFT's LoRA on the toy base, two steps of SGD, losses for TensorBoard
TRAINER = """
import sys
from pathlib import Path
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

pipeline, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model = FluxTransformer2DModel.from_pretrained(pipeline, subfolder="transformer")
model.requires_grad_(False)
torch.manual_seed(1)
model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_out"]))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer, writer = torch.optim.SGD(trained, lr=10.0), SummaryWriter(folder / "logs")
for step in range(steps):
    out = model(
        hidden_states=torch.randn(1, 4, 64), encoder_hidden_states=torch.randn(1, 3, 64),
        pooled_projections=torch.randn(1, 64), timestep=torch.tensor([0.5]),
        guidance=torch.tensor([1.0]), txt_ids=torch.zeros(3, 3), img_ids=torch.zeros(4, 3),
    ).sample
    loss = (out - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    writer.add_scalar("loss", loss.item(), step)
writer.close()
save_file(get_peft_model_state_dict(model), folder / "lora.safetensors")
"""


def prepared(script):
    """A `Prepare` for a script that is in the checkout."""

    def prepare(checkout: Path, folder: Path, steps: int) -> Loop:
        file = checkout / "train.py"
        file.write_text(script)
        return Loop(
            words=[str(file), str(tiny.PIPELINE), str(folder), str(steps)],
            saved="lora.safetensors",
            losses=lambda _, mine: tiny.logged(mine, "loss"),
            folder=folder,
        )

    return prepare


def test_a_trainer_trains_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loops, "cases_of", lambda _: {"LoRA": prepared(TRAINER)})
    words = [
        "loops",
        "--host-path",
        f"diffusers={tmp_path}",
        "--results",
        str(tmp_path / "results"),
    ]
    assert main(words) == 0
    (result,) = read_all(tmp_path / "results")
    (record,) = result.records
    assert (record["contestant"], record["mode"]) == ("diffusers", "LoRA")
    assert record["losses"][1] != record["losses"][0] and len(record["losses"]) == 2
    assert record["loss_error"] < loops.SAME_LOSS
    # A and B of q in both kinds of block, of the single blocks' last linear, and of the model's
    assert record["weights"] == 2 * (2 + 6 + 6 + 1)
    assert 0 < record["weights_error"] < loops.SAME_WEIGHTS
    assert record["blocks"] == record["blocks_fused"] == 8
    assert record["calls"] == record["calls_fused"] == 16
    assert result.data["installed"] == {"diffusers": {name: version(name) for name in PACKAGES}}
    # where a checkout lay on a machine is not stored
    assert str(tmp_path) not in json.dumps(result.data)
    assert "16 of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "print('\\x1b[32mno model in /some/folder/model.py\\x1b[0m')\nraise SystemExit(3)",
            "exit status 3: no model in model.py$",
        ),
        ("print('nothing to do')", "it saved no lora.safetensors"),
    ],
)
def test_a_script_that_does_not_train_says_why(tmp_path, script, why):
    with pytest.raises(RuntimeError, match=why):
        measure(prepared(script), tmp_path, tmp_path / "runs", 2)


def test_another_number_of_steps_is_seen(tmp_path):
    def prepare(checkout, folder, steps):
        save_file({"a": torch.ones(2)}, folder / "lora.safetensors")
        (checkout / "train.py").write_text("")
        words = [str(checkout / "train.py")]
        return Loop(words, "lora.safetensors", lambda *_: [1.0], folder)

    with pytest.raises(RuntimeError, match="it told 1 and 1 losses, of 2 steps"):
        measure(prepare, tmp_path, tmp_path / "runs", 2)


def test_what_differs_is_a_fault():
    good = {"contestant": "a", "mode": "LoRA", "loss_error": 0.0, "weights_error": 1e-6}
    good |= {"calls": 4, "calls_fused": 4}
    assert loops.violations([good]) == []
    bad = [
        good | {"loss_error": 1e-3},
        good | {"weights_error": float("nan")},
        good | {"calls_fused": 3},
        good | {"calls": 0, "calls_fused": 0},
        {"contestant": "a", "mode": "LoRA", "reason": "exit status 1: it broke"},
    ]
    assert loops.violations(bad) == [
        "a, LoRA: loss_error is 0.001, at most 0.0001",
        "a, LoRA: weights_error is nan, at most 0.001",
        "a, LoRA: 3 of 4 calls of its blocks ran fused",
        "a, LoRA: 0 of 0 calls of its blocks ran fused",
        "a, LoRA: exit status 1: it broke",
    ]


def test_a_python_is_asked_what_it_has(tmp_path):
    assert versions_in(sys.executable) == {name: version(name) for name in PACKAGES}
    other = tmp_path / "python"
    # a Python with a package that this one has in another version, and with nothing else
    packages = tmp_path / "packages"
    (packages / "peft-0.1.dist-info").mkdir(parents=True)
    (packages / "peft-0.1.dist-info" / "METADATA").write_text("Name: peft\nVersion: 0.1\n")
    other.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
    other.chmod(0o755)
    assert versions_in(str(other)) == {"peft": "0.1"}
    # what doesn't answer
    assert versions_in(str(tmp_path / "none")) == {}
    other.write_text("#!/bin/sh\necho no Python\n")
    assert versions_in(str(other)) == {}
    other.write_text("#!/bin/sh\nexit 3\n")
    assert versions_in(str(other)) == {}


def result(date, *records, **more):
    conditions = {"date": date, "device": "a CPU", "commit": "c0ffee", "command": "loops"}
    conditions |= {"versions": {"torch": "2.14"}}
    data = {"kind": "loops", "conditions": conditions, "records": list(records)}
    return Result("cpu", Path("x"), data | more)


def test_each_trainer_is_shown_with_the_versions_of_its_own_python():
    good = {"case": "tiny", "mode": "LoRA", "calls": 4, "calls_fused": 4}
    good |= {"loss_error": 1e-7, "weights_error": 2e-6}
    records = [
        good | {"contestant": "onetrainer", "version": "abc of 2026-01-01"},
        good | {"contestant": "sd-scripts", "version": "def of 2026-01-02"},
        good | {"contestant": "ai-toolkit", "version": "012 of 2026-01-03"},
    ]
    installed = {
        "onetrainer": {"torch": "2.14.1", "transformers": "5.5.4"},
        "sd-scripts": {"torch": "2.14.1", "transformers": "4.54.1"},
        "ai-toolkit": {},
    }
    text = trainers_sections.scripts(
        [result("2026-11-03T00:00:00Z", *records, installed=installed)]
    )
    assert text.endswith(
        "OneTrainer abc of 2026-01-01 (torch 2.14.1, transformers 5.5.4), "
        "sd-scripts def of 2026-01-02 (torch 2.14.1, transformers 4.54.1), "
        "ai-toolkit 012 of 2026-01-03: a CPU; c0ffee, 2026-11-03."
    )
    # a result from before trainers were asked says the command's own
    (old,) = records[:1]
    text = trainers_sections.scripts([result("2026-11-03T00:00:00Z", old)])
    assert text.endswith("OneTrainer abc of 2026-01-01: a CPU, torch 2.14; c0ffee, 2026-11-03.")


def test_the_newest_run_of_each_trainer_is_shown():
    good = {"case": "tiny", "mode": "LoRA", "version": "abc of 2026-01-01", "calls": 4}
    good |= {"loss_error": 1e-7, "weights_error": 2e-6, "calls_fused": 4}
    first = result(
        "2026-11-01T00:00:00Z",
        good | {"contestant": "onetrainer", "calls_fused": 3},
        good | {"contestant": "sd-scripts"},
        {"case": "tiny", "mode": "LoHa", "contestant": "sd-scripts", "reason": "it broke"},
    )
    second = result("2026-11-02T00:00:00Z", good | {"contestant": "onetrainer"})
    text = trainers_sections.scripts([second, first])
    assert "| OneTrainer | LoRA | 4 of 4 | 1e-07 | 2e-06 |" in text
    assert "| sd-scripts | LoRA | 4 of 4 |" in text
    assert "OneTrainer abc of 2026-01-01: " in text and "sd-scripts abc of 2026-01-01: " in text
    assert text.endswith("Did not run: sd-scripts, LoHa (it broke).")
    assert trainers_sections.scripts([]) == ""


def test_what_is_not_there_is_named(tmp_path, capsys):
    for words, said in (
        ([], "name a checkout"),
        (["--host-path", f"kohya={tmp_path}"], "kohya"),
        (["--host-path", f"diffusers={tmp_path}/none"], "names nothing that exists"),
        (["--host-path", f"diffusers={tmp_path}", "--cases", "LoRa"], "LoRa"),
    ):
        assert main(["loops", *words, "--results", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err


def test_each_trainer_prepares_its_files(tmp_path):
    """All but the last program: no trainer's code is here."""
    for trainer in loops.LOOPS:
        for case, prepare in loops.cases_of(trainer).items():
            folder = tmp_path / f"{trainer}-{case}"
            folder.mkdir()
            loop = prepare(tmp_path / "checkout", folder, 2)
            assert loop.folder in (folder, tmp_path / "checkout")
            assert any("checkout" in word for word in loop.words)
            assert len(list((folder / "pictures").rglob("*.png"))) == 2, trainer


def test_the_toy_transformer_in_black_forest_labs_layout(tmp_path):
    from safetensors.torch import load_file

    made = load_file(bfl_files.write_transformer(tmp_path / "flux.safetensors"))
    theirs = load_file(tiny.PIPELINE / "transformer/diffusion_pytorch_model.safetensors")
    q, k, v = (
        theirs[f"transformer_blocks.1.attn.to_{name}.weight"].float() for name in ("q", "k", "v")
    )
    assert torch.equal(made["double_blocks.1.img_attn.qkv.weight"], torch.cat([q, k, v]))
    # shift and scale of the last norm are the other way round
    scale, shift = theirs["norm_out.linear.weight"].float().chunk(2)
    last = made["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(last, torch.cat([shift, scale]))
