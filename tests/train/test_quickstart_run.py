"""The quickstart's two files, with only their paths changed, and a shorter run."""

import json
import shutil
from itertools import cycle
from pathlib import Path

import pytest
from PIL import Image

from fluxfast.cli import train
from fluxfast.cli.plan import plan_report
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train.events import read_metrics

QUICKSTART = Path(__file__).parents[1] / "fixtures" / "quickstart"
# the quickstart's run takes hours; every dataset is drawn in so few steps with an equal weight each
SHORTER = (
    "--max_train_steps=10",
    "--lr_warmup_steps=1",
    "--data_backend_sampling=uniform",
    "--validation_resolution=128x128",
    "--validation_num_inference_steps=1",
    "--disable_benchmark=true",
    "--checkpointing_steps=4",
)


@pytest.fixture
def quickstart(workspace, tmp_path, monkeypatch):
    """The quickstart's folders, in the current one: `config/` and `datasets/`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(QUICKSTART, tmp_path / "config")
    file = tmp_path / "config" / "config.json"
    keys = json.loads(file.read_text())
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        keys[f"--{name}"] = str(workspace / "pipeline")
    file.write_text(json.dumps(keys))
    photographs = sorted((workspace / "images").glob("*.png"))
    for folder, sizes in {
        "pseudo-camera-10k": [(640, 520), (520, 700), (512, 512), (900, 600), (530, 530)],
        "dreambooth-subject": [(1280, 1080), (1080, 1280), (1024, 1024)],
    }.items():
        (tmp_path / "datasets" / folder).mkdir(parents=True)
        for number, (photograph, size) in enumerate(zip(cycle(photographs), sizes, strict=False)):
            with Image.open(photograph) as image:
                image.resize(size).save(tmp_path / "datasets" / folder / f"a_photo_{number}.jpg")
    return tmp_path


def test_the_quickstart_trains_and_goes_on(quickstart, capsys):
    assert train.main(SHORTER) == 0
    told = capsys.readouterr().out
    assert "not implemented" not in told
    steps = read_metrics(quickstart / "output" / "models" / "metrics.jsonl")
    assert {step["dataset"] for step in steps} == {
        "pseudo-camera-10k-flux",
        "dreambooth-subject",
        "dreambooth-subject-512",
    }
    output = quickstart / "output" / "models"
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    prompts = 1 + len(json.loads((quickstart / "config/user_prompt_library.json").read_text()))
    assert len(list((output / "validation_images").glob("step_000010_*_128x128.png"))) == prompts
    # the same command goes on: it has nothing left to do, a longer one has
    longer = [option.replace("steps=10", "steps=11") for option in SHORTER]
    assert train.main(longer) == 0
    assert [step["step"] for step in read_metrics(output / "metrics.jsonl")] == [*range(1, 12)]


# what the quickstart lists under "Lowest VRAM config", for a card of 10 or 12 GB
LOWEST = {
    "base_model_precision": "nf4-bnb", "optimizer": "bnb-lion8bit-paged", "train_batch_size": 1,
    "gradient_accumulation_steps": 1, "quantize_via": "cpu", "gradient_checkpointing": True,
    "vae_enable_tiling": True, "offload_during_startup": True, "max_grad_norm": 0.01,
}  # fmt: skip


def test_the_lowest_vram_config_is_planned_and_runs(write_config, run):
    at_512 = {"dataset": {"resolution": 512}, "lora_rank": 16}
    full_size = load_config(
        write_config(
            **LOWEST, **at_512, pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev"
        )
    )
    plan = plan_report(full_size, "RTX 3080")
    # the quickstart's own figure is 9090 MiB
    assert plan["fits"] and plan["vram_needed"] < 9090 * 2**20
    lora, _ = run(**LOWEST, max_train_steps=3)
    assert len(read_metrics(lora.parent / "metrics.jsonl")) == 3
    # "less compatible with options like SageAttention", as the quickstart has it of nf4
    with pytest.raises(ConfigError, match=r"sageattention.*nf4"):
        load_config(write_config(**LOWEST, attention_mechanism="sageattention"))
